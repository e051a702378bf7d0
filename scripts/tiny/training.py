"""Training in stages that survives being killed; what is trained, on what and how good it is belongs to the subclasses."""

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage: `steps` batches of `batch` scenes of `canvas` pixels, learning rate from `rate` down to a fiftieth.

    With a deadline, `share` is its part of the time, relative to the stages that are left, and `steps` are the most it makes.
    """

    name: str
    steps: int
    batch: int
    canvas: int
    rate: float
    share: float = 1.0


class Training:
    """Runs the stages and keeps the state on disk.

    Args:
        model: what is trained, in place.
        folder: where the training state is kept.
        stages: stages in order.
        device: `cuda` or `cpu`.
        seed: seed of scenes and pruning; weights are seeded by whoever builds the model.
        save_every_s: seconds between two saved states.
    """

    precision: torch.dtype | None = torch.bfloat16  # of autocast
    deadline: float | None = None  # when the last stage ends, as `time.time()` counts; every stage gets its `share` of the time then

    def __init__(self, model, folder: Path, stages, device: str = "cpu", seed: int = 0, save_every_s: int = 180):
        self.model, self.folder, self.stages = model.to(device), folder, stages
        self.device, self.seed, self.save_every_s = device, seed, save_every_s
        self.heads: Any = nn.Module()  # trained with the model, not part of it
        self.done = {stage.name: 0 for stage in stages}
        self.seconds = 0.0
        self.clock: dict[str, list[float]] = {}  # when a stage began and when it ends, by the clock
        self.optimizer_state: dict | None = None

    def groups(self, stage) -> list[dict]:
        """Returns the parameter groups of a stage, each with the `scale` of its learning rate."""
        return [{"params": [*self.model.parameters(), *self.heads.parameters()], "scale": 1.0}]

    def batches(self, stage) -> Dataset:
        """Batches of a stage by their number, each a dict of tensors."""
        raise NotImplementedError

    def loss(self, stage, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch and scores (on fresh scenes: held-out ones)."""
        raise NotImplementedError

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Writes the whole state at once: a killed run loses minutes, never the file."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else None,
            "done": self.done,
            "seconds": self.seconds,
            "clock": self.clock,
        }
        part = self.state_file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.state_file)

    def resume(self) -> bool:
        """Loads the state of an earlier run of the same recipe, if there is one."""
        if not self.state_file.exists():
            return False
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"], strict=False)
        self.optimizer_state, self.seconds = state["optimizer"], state["seconds"]
        self.clock = state.get("clock", {})
        self.done.update({name: steps for name, steps in state["done"].items() if name in self.done})
        log.info("resumed: %s", self.done)
        return True

    @property
    def left(self) -> list[str]:
        """Stages that are not done yet."""
        return [stage.name for stage in self.stages if self.done[stage.name] < stage.steps]

    def run(self, only: str | None = None) -> bool:
        """Trains the stages that are not done yet, or only the one named; returns True where this finished the last one."""
        before = self.left
        self.folder.mkdir(parents=True, exist_ok=True)
        for stage in self.stages:
            if only in (None, stage.name) and stage.name in self.left:
                self._stage(stage)
        return bool(before) and not self.left

    def _loader(self, stage, first: int) -> Iterator[dict[str, Tensor]]:
        workers = 1 if self.device == "cpu" else min(12, os.cpu_count() or 1)
        rest = Subset(self.batches(stage), range(first, stage.steps))
        return iter(DataLoader(rest, batch_size=None, num_workers=workers, prefetch_factor=4))

    def _stage(self, stage) -> None:
        optimizer = torch.optim.AdamW(self.groups(stage), lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.02)
        first = self.done[stage.name]
        if first and self.optimizer_state:
            optimizer.load_state_dict(self.optimizer_state)
        self.optimizer_state = None
        self.model.train()
        scores: dict[str, list[float]] = defaultdict(list)
        saved = started = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()
        with Progress(*columns) as progress:
            task = progress.add_task(stage.name, total=stage.steps, completed=first)
            try:
                for step, batch in enumerate(self._loader(stage, first), start=first):
                    at = max(step, int(self._clock(stage) * stage.steps))
                    if at >= stage.steps:
                        self.done[stage.name] = stage.steps
                        break
                    for group in optimizer.param_groups:
                        group["lr"] = stage.rate * group["scale"] * schedule(at, stage.steps)
                    for name, value in self._step(stage, step, batch, optimizer).items():
                        scores[name].append(value)
                    self.done[stage.name] = step + 1
                    progress.advance(task)
                    now = time.monotonic()
                    if (step + 1) % 50 == 0 or step + 1 == stage.steps:
                        self._report(stage, step + 1, scores, (step + 1 - first) * stage.batch / (now - started))
                        scores.clear()
                    if now - saved > self.save_every_s:
                        self.seconds += now - saved
                        saved = now
                        self.save(optimizer)
            finally:  # also on Ctrl-C
                self.seconds += time.monotonic() - saved
                self.save(optimizer if stage.name in self.left else None)

    def _clock(self, stage) -> float:
        """Returns the share of a stage's time that is over: 0 where only its steps count."""
        if self.deadline is None:
            return 0.0
        if stage.name not in self.clock:
            now, shares = time.time(), [one.share for one in self.stages if one.name in self.left]
            self.clock[stage.name] = [now, now + max(1e-3, self.deadline - now) * stage.share / sum(shares)]
        begin, end = self.clock[stage.name]
        return (time.time() - begin) / (end - begin)

    def _step(self, stage, step: int, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device, dtype=self.precision, enabled=self.precision is not None):
            loss, scores = self.loss(stage, step, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        return {"loss": float(loss.detach()), **scores}

    def _report(self, stage, step: int, scores: dict[str, list[float]], speed: float) -> None:
        means = {name: sum(v for v in values if v == v) / max(1, sum(v == v for v in values)) for name, values in scores.items()}
        text = " ".join(f"{name}={value:.3f}" for name, value in means.items())
        log.info("%s %d/%d %.1f img/s %s", stage.name, step, stage.steps, speed, text)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 3 % of the steps (at most 200), then cosine down to 2 %."""
    warm = max(1, min(200, steps * 3 // 100))
    return min(1.0, (step + 1) / warm) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
