"""Cells: which combinations of method, budget, setting, task and seed are run, and the fingerprint of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from vtr.eval.run.provenance import code_hash, device_name, versions
from vtr.eval.tasks import Task
from vtr.models.pixels import PixelLimits
from vtr.registry import create_method, method_class
from vtr.types import BUDGETS, Budget, Method, plain
from vtr.types.errors import WrongValue
from vtr.types.naming import FULL
from vtr.types.settings import default_settings


@dataclass(frozen=True)
class Cell:
    """One experiment: one method, or several as a plan, with all settings on one task.

    Args:
        method: the method to apply, a tuple of methods for a plan, None for the full model.
        task: what is asked.
        seed: of the method's random choices, None for a method without.
        limit: at most so many samples of each family, None for all.
        max_new_tokens: None for the task's own.
    """

    method: Method | tuple[Method, ...] | None
    task: Task
    seed: int | None = None
    limit: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("seed", "limit", "max_new_tokens"):  # of numpy, for example
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def methods(self) -> tuple[Method, ...]:
        """What is applied, in order; nothing for the full model."""
        return self.method if isinstance(self.method, tuple) else () if self.method is None else (self.method,)

    @property
    def name(self) -> str:
        """Name of the method, `full` without one, names joined by `+` for a plan."""
        return "+".join(method.name for method in self.methods) or FULL

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting but the seed, which has its own place; those of a plan under `plan`, with the budget that it ends at on top."""
        own = [
            {k: v for k, v in self._settings(method).items() if k != "seed" or isinstance(self.method, tuple)} for method in self.methods
        ]
        if not isinstance(self.method, tuple):
            return own[0] if own else {}
        last = {k: own[-1][k] for k in BUDGETS if own[-1][k] is not None}
        return {"plan": [{"method": m.name, **settings} for m, settings in zip(self.methods, own, strict=True)], **last}

    def _settings(self, method: Method) -> dict[str, Any]:
        return _settings_of(method, video=self.task.frames is not None)

    @property
    def label(self) -> str:
        """For progress and tables: `fastv keep=64 layer=3 seed 1`, with the settings that are not the default."""
        changed = [f"{k}={v}" for method in self.methods[-1:] for k, v in changed_settings(method).items()]
        return " ".join([self.name, *changed, *([f"seed {self.seed}"] if self.seed is not None else [])])

    @property
    def reads_frame_scores(self) -> bool:
        """Tells whether a method of it wants to know how much every frame has to do with the question."""
        return any(method.card.needs_frame_scores for method in self.methods)

    @property
    def answer_length(self) -> int:
        """Most new tokens of an answer."""
        return self.max_new_tokens or self.task.max_new_tokens


def changed_settings(method: Method) -> dict[str, Any]:
    """Returns the settings that differ from the class's defaults, without the seed."""
    return {k: v for k, v in _settings_of(method).items() if k != "seed" and v != default_settings(type(method)).get(k)}


def _settings_of(method: Method, video: bool = False) -> dict[str, Any]:
    """Returns all settings as they act; what a method sees of a video only where there are videos, or where that was asked for."""
    return {k: v for k, v in asdict(method.resolved(video=video)).items() if k != "frames" or v is not None}


def plan_cells(
    methods: Sequence[str],
    budgets: Sequence[Budget],
    tasks: Sequence[Task],
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> list[Cell]:
    """Returns every combination that differs: methods without budget once, only methods with a `seed` setting vary over seeds.

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
            raise WrongValue(f"settings: {name!r} is not among the methods that are run ({', '.join(methods)})")
    if limit is not None and limit < 1:
        raise WrongValue(f"limit: must be at least 1, got {limit}")
    cells: list[Cell] = []
    for task in tasks:
        for name in dict.fromkeys(methods):
            for method, seed in variants(name, budgets, seeds, dict(settings.get(name, {}))):
                cells.append(Cell(method, task, seed, limit, max_new_tokens))
    return cells


def variants(
    name: str, budgets: Iterable[Budget], seeds: Sequence[int], settings: dict[str, Any]
) -> list[tuple[Method | None, int | None]]:
    """Returns a method, or `full`, with every budget and seed that makes a difference.

    Raises:
        ValueError, TypeError: unknown method or setting, impossible value.
    """
    if name == FULL:
        if settings:
            raise WrongValue(f"full: is the model without reduction and has no settings, got {', '.join(settings)}")
        return [(None, None)]
    cls = method_class(name)
    given = [] if not cls.takes_budget else [{k: v for k, v in asdict(b).items() if v is not None} for b in budgets]
    if any(k in settings for k in BUDGETS):
        given = []  # the method's own budget wins over the list for all
    has_seed = any(f.name == "seed" for f in fields(cls)) and "seed" not in settings
    return [
        (create_method(name, **settings, **budget, **({"seed": seed} if has_seed else {})), seed)
        for budget in given or [{}]
        for seed in (seeds if has_seed else [settings.get("seed")])
    ]


def fingerprint(
    cell: Cell,
    model: Mapping[str, Any],
    dtype: torch.dtype,
    attention: str,
    device: str,
    model_type: str | None = None,
    pixels: PixelLimits | None = None,
    shown: Mapping[str, str] | None = None,
    scorer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what makes two runs of a cell the same experiment, as JSON; equal fingerprints are never run twice.

    Limits of pixels are there where they are not the processor's own; `shown` is how a model without videos was shown them, see
    `vtr.eval.run.setup.noted`; `scorer` is the model that scores frames, from `identify`, with its `model_type`: only cells that read scores have it.
    """
    read = dict(scorer) if scorer and cell.reads_frame_scores else {}
    scorer_type = read.pop("model_type", None)
    content = {
        "method": cell.name,
        "settings": cell.settings,
        "seed": cell.seed,
        "model": dict(model),
        "task": {**cell.task.identity, "limit": cell.limit},
        "max_new_tokens": cell.answer_length,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "device": device_name(device),
        "versions": versions(),
        "code": code_hash(cell.methods, model_type, scorer_type),
        **(pixels.given if pixels is not None else {}),
        **(shown or {}),
        **({"frame_scores": read} if read else {}),
    }
    return json.loads(json.dumps(content))  # tuples are lists there, and a fingerprint is compared with one that was read
