"""Cells: which combinations of method, budget, setting, task and seed are run, and the fingerprint of each."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vtr
from vtr.eval.tasks import Task
from vtr.registry import create_method, method_class
from vtr.types import Budget, Method

FULL = "full"  # a row of every table, not a method: the model without any reduction
_VERSIONED = ("torch", "transformers", "tokenizers", "pillow", "numpy")


@dataclass(frozen=True)
class Cell:
    """One experiment: one method with all its settings on one task.

    Args:
        method: the method to apply, None for the full model.
        task: what is asked.
        seed: of the method's random choices, None for a method without.
        limit: at most so many samples of each family, None for all.
        max_new_tokens: None for the task's own.
    """

    method: Method | None
    task: Task
    seed: int | None = None
    limit: int | None = None
    max_new_tokens: int | None = None

    @property
    def name(self) -> str:
        """Name of the method, `full` without one."""
        return self.method.name if self.method else FULL

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting but the seed, which has its own place."""
        return {k: v for k, v in asdict(self.method).items() if k != "seed"} if self.method else {}

    @property
    def label(self) -> str:
        """For progress and tables: `fastv keep=64 seed 1`."""
        budget = [f"{k}={self.settings[k]}" for k in ("keep", "keep_ratio", "average_keep") if self.settings.get(k) is not None]
        return " ".join([self.name, *budget, *([f"seed {self.seed}"] if self.seed is not None else [])])

    @property
    def answer_length(self) -> int:
        """Most new tokens of an answer."""
        return self.max_new_tokens or self.task.max_new_tokens


def plan_cells(
    methods: Sequence[str],
    budgets: Sequence[Budget],
    tasks: Sequence[Task],
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> list[Cell]:
    """Every combination that differs: methods without budget once, only methods with a `seed` setting vary over seeds.

    Args:
        methods: registry names, or `full`.
        budgets: none = each method's default budget.
        tasks, seeds: as in `Cell`.
        settings: method name -> settings beyond budget and seed.
        limit, max_new_tokens: as in `Cell`.

    Raises:
        ValueError: unknown method or setting, impossible value, settings for a method that is not run.
    """
    settings = settings or {}
    for name in settings:
        if name not in methods:
            raise ValueError(f"settings: {name!r} is not among the methods that are run ({', '.join(methods)})")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: must be at least 1, got {limit}")
    cells: list[Cell] = []
    for task in tasks:
        for name in dict.fromkeys(methods):
            for method, seed in _variants(name, budgets, seeds, dict(settings.get(name, {}))):
                cells.append(Cell(method, task, seed, limit, max_new_tokens))
    return cells


def _variants(
    name: str, budgets: Iterable[Budget], seeds: Sequence[int], settings: dict[str, Any]
) -> list[tuple[Method | None, int | None]]:
    if name == FULL:
        if settings:
            raise ValueError(f"full: is the model without reduction and has no settings, got {', '.join(settings)}")
        return [(None, None)]
    cls = method_class(name)
    given = [] if cls.default_budget is None else [{k: v for k, v in asdict(b).items() if v is not None} for b in budgets]
    if any(k in settings for k in ("keep", "keep_ratio", "average_keep")):
        given = []  # the method's own budget wins over the list for all
    has_seed = any(f.name == "seed" for f in fields(cls)) and "seed" not in settings
    return [
        (create_method(name, **settings, **budget, **({"seed": seed} if has_seed else {})), seed)
        for budget in given or [{}]
        for seed in (seeds if has_seed else [settings.get("seed")])
    ]


def fingerprint(cell: Cell, model: Mapping[str, Any], dtype: torch.dtype, attention: str, device: str) -> dict[str, Any]:
    """What makes two runs of a cell the same experiment, as JSON; equal fingerprints are never run twice."""
    return {
        "method": cell.name,
        "settings": cell.settings,
        "seed": cell.seed,
        "model": dict(model),
        "task": {**cell.task.identity, "limit": cell.limit},
        "max_new_tokens": cell.answer_length,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "device": device_name(device),
        "versions": {"vtr": vtr.__version__, **{name: _version(name) for name in _VERSIONED}},
    }


def device_name(device: str) -> str:
    """`cpu`, or the kind with the name of the hardware: `cuda NVIDIA H200`."""
    kind = device.split(":")[0]
    cuda = torch.cuda.is_available() and (kind == "cuda" or device == "auto")
    return f"{kind} {torch.cuda.get_device_name()}" if cuda else kind


def conditions(batch_size: int) -> dict[str, Any]:
    """What may change times but not answers."""
    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "git": _git_commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(vtr.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
