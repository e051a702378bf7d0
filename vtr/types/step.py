"""What a method does at one place of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vtr.types.settings import check_choices, check_types
from vtr.types.signals import Signal
from vtr.types.view import View

Stage = Literal["input", "tower", "boundary", "prefill", "decode"]
Action = Literal["remove", "merge", "restore", "freeze", "observe", "input"]
PositionOption = Literal["keep", "renumber"]
NewlineOption = Literal["rows", "all", "none"]

STAGES: tuple[Stage, ...] = ("input", "tower", "boundary", "prefill")  # `decode` is a word without an engine yet
ACTIONS: tuple[Action, ...] = ("remove", "merge", "restore", "freeze", "observe", "input")


@dataclass(frozen=True)
class Step:
    """One thing a method does at one place of the model.

    Args:
        stage: where; `input` is the pixel values in front of the tower.
        layer: 0-based; at layer k = gone from the input of layer k on. Ignored at the boundary.
        action: what `select` answers: `remove` and `merge` a Selection, `observe` None, `freeze` needs no `select`, `input` the new patch
            grid of a view as `(rows, cols)`, `restore` the values `(G, n, D)` of all tokens that the method's merge found (tower only; from
            the input of `layer` on, and for every output read before that; without a `select` each token gets its pivot's value).
        needs: signals read.
        select: `View -> Selection | None`.
        share: what an earlier removal of a schedule leaves, as the share of the way from keep (0) to N (1).
        counted: False = `view.keep` is not meant for this step: it decides how much stays.
        at: `layer` = at the input of the layer; `mlp` = between its attention and its MLP (tower merging).
        per: rows of the View are images (all their views) or single views with their quota.
        proportional: after this merge, keys weigh `log(size)` in the tower's attention.
        grid: `(rows, cols)` of tokens -> the smaller grid that this merge leaves of it; what windowed ViTs have to know before they run.
        side: boundary only: after the projector (LLM tokens) or before it (tower features); final_norm: `select` calls `view.final_norm`.
    """

    stage: Stage
    layer: int = 0
    action: Action = "remove"
    needs: tuple[Signal, ...] = ()
    select: Callable[[View], Any] | None = None
    share: float = 0.0
    counted: bool = True
    at: Literal["layer", "mlp"] = "layer"
    per: Literal["image", "view"] = "image"
    proportional: bool = True
    grid: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    side: Literal["after_projector", "before_projector"] = "after_projector"
    final_norm: bool = False

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise ValueError(f"Step: stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        if self.action not in ACTIONS:
            raise ValueError(f"Step: action must be one of {', '.join(ACTIONS)}, got {self.action!r}")
        if self.select is None and self.action not in ("freeze", "restore"):
            raise ValueError(f"Step: action {self.action!r} needs a select function, got None")
        check_types(self, "Step")
        check_choices(self, "Step")
