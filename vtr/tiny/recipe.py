"""How tiny-llava is trained: a supervised tower, then the whole model on windows, then on whole pictures.

Every stage draws new scenes on the fly. Windows of 12 x 12 patches lie anywhere in the 24 x 24 grid and keep the positions they
have there, for the tower and for the LLM, so that whole pictures need no new positions. Visual tokens are pruned at random in
a share of the steps, and now and then there are none: less work, and a model that copes with fewer.
"""

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vtr.data.scenes import CANVAS, Dice

from .batches import FAMILIES, Batches
from .model import CONTEXT, GRID, HEADS, Supervision, anyres_layout, grid_positions, llm_pass, take, tower_pass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage: `steps` batches of `batch` scenes of `canvas` pixels, learning rate from `rate` down to a fiftieth."""

    name: str
    steps: int
    batch: int
    canvas: int
    rate: float
    closeups: int = 0
    questions: bool = True
    anyres: bool = False  # thumbnail and crops, with the tower as it is
    seen: float = 1.0  # share of the patches that the tower gets to see, objects first
    tower_every: int = 1  # the tower learns in every so many steps
    pruned: int = 50  # percent of steps with randomly pruned visual tokens
    fewest: float = 0.3  # smallest share of them that stays
    most: float = 1.0  # largest share


STAGES = (
    Stage("tower", 1200, 32, CANVAS // 2, 1.5e-3, closeups=8, questions=False, seen=0.6),
    Stage("llava96", 12000, 8, CANVAS // 2, 1.2e-3, seen=0.6, tower_every=3, pruned=10),
    Stage("llava192", 7000, 6, CANVAS, 8e-4, closeups=10, seen=0.4, tower_every=4, pruned=15, fewest=0.2),
    Stage("whole", 3000, 6, CANVAS, 6e-4, closeups=10, tower_every=2, pruned=75, fewest=0.1),
)
NEXT_STAGES = (Stage("next", 500, 4, CANVAS, 3e-4, anyres=True, pruned=85, fewest=0.1, most=0.5),)
TOWER_RATE = 0.5  # of the learning rate, once the tower has had its own stage
FAMILY_WEIGHT = {"relation": 3.0, "counting": 3.0}  # learned last
NO_IMAGE = 3  # percent of steps without visual tokens
RENUMBERED = 25  # percent of pruned steps whose positions close the gaps


class Trainer:
    """Trains one model through its stages and survives being killed.

    Args:
        model: LLaVA to train, in place.
        tokenizer: its tokenizer.
        folder: where the training state and the log are kept.
        stages: stages in order.
        device: `cuda` or `cpu`.
        seed: seed of scenes and pruning; weights are seeded by whoever builds the model.
        save_every_s: seconds between two saved states.
    """

    def __init__(self, model, tokenizer, folder: Path, stages=STAGES, device: str = "cpu", seed: int = 0, save_every_s: int = 180):
        self.model, self.tokenizer, self.folder, self.stages = model.to(device), tokenizer, folder, stages
        if device == "cpu":
            model.set_attn_implementation("eager")  # its backward pass in bf16 takes a fifth of the time of SDPA's
        self.device, self.seed, self.save_every_s = device, seed, save_every_s
        self.heads = Supervision(model.config.vision_config.hidden_size).to(device)
        self.done = {stage.name: 0 for stage in stages}
        self.seconds = 0.0
        self.optimizer_state: dict | None = None

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write the whole state at once: a killed run loses minutes, never the file."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else None,
            "done": self.done,
            "seconds": self.seconds,
        }
        part = self.state_file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.state_file)

    def resume(self) -> bool:
        """Load the state of an earlier run of the same recipe, if there is one."""
        if not self.state_file.exists():
            return False
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"], strict=False)
        self.optimizer_state, self.seconds = state["optimizer"], state["seconds"]
        self.done.update({name: steps for name, steps in state["done"].items() if name in self.done})
        log.info("resumed: %s", self.done)
        return True

    @property
    def left(self) -> list[str]:
        """Stages that are not done yet."""
        return [stage.name for stage in self.stages if self.done[stage.name] < stage.steps]

    def run(self, only: str | None = None) -> bool:
        """Train the stages that are not done yet, or only the one named; True where this finished the last one."""
        before = self.left
        self.folder.mkdir(parents=True, exist_ok=True)
        for stage in self.stages:
            if only in (None, stage.name) and stage.name in self.left:
                self._stage(stage)
        return bool(before) and not self.left

    def _loader(self, stage: Stage, first: int) -> Iterator[dict[str, Tensor]]:
        asking = self.tokenizer if stage.questions else None
        data = Batches(asking, stage.steps, stage.batch, stage.canvas, stage.closeups, stage.anyres, self.seed)
        workers = 1 if self.device == "cpu" else min(12, os.cpu_count() or 1)
        return iter(DataLoader(Subset(data, range(first, stage.steps)), batch_size=None, num_workers=workers, prefetch_factor=4))

    def _stage(self, stage: Stage) -> None:
        tower = set(self.model.model.vision_tower.parameters())
        others = [p for p in (*self.model.parameters(), *self.heads.parameters()) if p not in tower]
        groups = [
            {"params": [p for p in self.model.parameters() if p in tower], "scale": TOWER_RATE if stage.questions else 1.0},
            {"params": others, "scale": 1.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.02)
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
                    for group in optimizer.param_groups:
                        group["lr"] = stage.rate * group["scale"] * schedule(step, stage.steps)
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

    def _step(self, stage: Stage, step: int, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss, scores = self.loss(stage, step, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        return {"loss": float(loss.detach()), **scores}

    def _report(self, stage: Stage, step: int, scores: dict[str, list[float]], speed: float) -> None:
        means = {name: sum(v for v in values if v == v) / max(1, sum(v == v for v in values)) for name, values in scores.items()}
        text = " ".join(f"{name}={value:.3f}" for name, value in means.items())
        log.info("%s %d/%d %.1f img/s %s", stage.name, step, stage.steps, speed, text)

    def loss(self, stage: Stage, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch and the share of questions answered right per family (on fresh scenes: a held-out score)."""
        dice = Dice(self.seed << 8 | 255, step)
        if stage.questions and dice.below(100) < NO_IMAGE:
            logits, _ = llm_pass(self.model, None, None, batch | {"start": torch.full_like(batch["ids"][:, 0], 2)})
            loss, _ = self._answers(logits, batch)
            return loss, {"none": float(loss.detach())}
        visual, where, aux, found = self._visual(stage, step, batch)
        if not stage.questions:
            return aux, found
        start = torch.full_like(where[:, 0], where.shape[1] if stage.anyres else GRID * GRID)
        if dice.below(100) < stage.pruned:
            keep = max(1, where.shape[1] * dice.between(int(stage.fewest * 1000), int(stage.most * 1000)) // 1000)
            kept = self._random(where.shape, step).topk(keep, dim=1).indices.sort(dim=1).values
            visual, where = take(visual, kept), take(where, kept)
            if dice.below(100) < RENUMBERED:
                where, start = torch.arange(keep, device=where.device).expand_as(where), torch.full_like(start, keep)
        logits, middle = llm_pass(self.model, visual, where + 2, batch | {"start": start + 2})
        loss, right = self._answers(logits, batch)
        away = self.heads.named(middle, batch["spots"])
        return loss + 0.3 * aux + away, {**right, **found, "away": float(away.detach())}

    def _random(self, shape: tuple[int, ...], step: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed << 32 | step)).to(self.device)

    def _visual(self, stage: Stage, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        """Visual tokens `(B, K, D)`, their raster indices `(B, K)`, loss and scores of the tower's supervision."""
        model, pixels = self.model.model, batch["pixels"]
        cells = pixels.shape[-1] // model.vision_tower.config.patch_size
        if stage.anyres:
            whole = torch.arange(cells * cells, device=pixels.device).expand(pixels.shape[0] * pixels.shape[1], -1)
            with torch.no_grad():
                features, _ = tower_pass(model.vision_tower, pixels.flatten(0, 1), whole, False)
            visual = anyres_layout(model.multi_modal_projector(features).unflatten(0, pixels.shape[:2]), model.image_newline)
            where = torch.arange(visual.shape[1], device=visual.device).expand(len(visual), -1)
            return visual, where, visual.new_zeros(()), {}
        where = grid_positions(batch["corner"], cells, cells)
        learns = step % stage.tower_every == 0
        kept = None
        if stage.seen < 1:  # objects first
            order = self._random(where.shape, step) + 0.6 * (batch["color"] > 0)
            kept = order.topk(int(stage.seen * where.shape[1]), dim=1).indices.sort(dim=1).values
            batch = batch | {name: take(batch[name], kept) for name in (*HEADS, *CONTEXT, "place")}
        with torch.set_grad_enabled(learns):
            features, cls = tower_pass(model.vision_tower, pixels, where, learns, kept)
        where = where if kept is None else take(where, kept)
        aux, found = self.heads(features, cls, batch) if learns else (features.new_zeros(()), {})
        if stage.questions:
            return model.multi_modal_projector(features), where, aux, {name: found[name] for name in ("char", "word", "alike", "place") if learns}
        return features, where, aux, found

    def _answers(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        asked = batch["target"] >= 0
        target, family = batch["target"][asked], batch["family"][asked]
        row = torch.arange(len(asked), device=asked.device)[:, None].expand_as(asked)
        weight = torch.tensor([FAMILY_WEIGHT.get(name, 1.0) for name in FAMILIES], device=target.device)[family]
        loss = (weight * F.cross_entropy(logits.float(), target, reduction="none")).sum() / weight.sum()
        which = (row * 64 + batch["question"])[asked]
        wrong = torch.zeros(len(asked) * 64 + 64, device=asked.device).index_add(0, which, (logits.argmax(-1) != target).float())
        right = (wrong[which] == 0).float()
        return loss, {name: float(right[family == n].mean()) for n, name in enumerate(FAMILIES) if (family == n).any()}


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 3 % of the steps (at most 200), then cosine down to 2 %."""
    warm = max(1, min(200, steps * 3 // 100))
    return min(1.0, (step + 1) / warm) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
