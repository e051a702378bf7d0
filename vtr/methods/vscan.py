"""VScan: keep what a shallow tower layer finds in every window and a deep one in the image, merge the rest, and prune once more in the LLM.

Paper: VScan, TMLR 2026, arXiv 2505.22654.
Code:  github.com/Tencent/SelfEvolvingAgent, VScan/ at a82450e, MIT: nothing copied, checked against its outputs.
Stage: boundary, then one LLM layer. Reads: CLS rows of two tower layers; queries and keys of the LLM layer. Batch: any. Deterministic: yes.

1. Half of the boundary's tokens are local: windows of 6 x 6 patches share it alike, and each gives those that CLS attends to most in layer 5 of 24.
2. The other half is global: the best of the rest by CLS attention in the tower layer whose output is used.
3. Behind the projector, every other token joins the kept token of highest cosine, which becomes the plain mean of itself and its members.
4. At the input of LLM layer 16 of 32, a third of them stay: those that the last token attends to most in that layer, mean over heads.
5. Each view of an AnyRes image is treated alike in steps 1 to 3, with its share of the budget.

Paper to code: R1 -> 3 keep (the average over the layers is 2 keep, so the published 64 is `average_keep=64`), R2 -> ratio.
Departures: counts are exact (the code loses the remainder over the windows), no token is both local and global, grids of any size have windows cut
from the first row and column on. Without a CLS token the scores are the attention received in layer 7 of 32 and in the last one, windows are of 4 x 4
where the tower joins patches, and no window gives more than the local half over the number of windows, rounded up, as the code has it for Qwen2.5-VL;
for SigLIP that is ours. On Qwen2.5-VL the code ranks in the LLM without the rotary embedding; here it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from vtr.methods._joined import joined
from vtr.ops.grids import largest
from vtr.ops.joining import join_nearest
from vtr.ops.parts import members, topk_per_part
from vtr.ops.prompt_rows import last_token_row
from vtr.ops.topk import quota, topk_mask
from vtr.registry import register_method
from vtr.types import (
    Boundary,
    Budget,
    Card,
    FrameOption,
    Geometry,
    Layer,
    Merge,
    Method,
    PositionOption,
    Remove,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    check_llm_layer,
)
from vtr.types.signals import cls_row, next_keys, next_queries, received


def windows_of(cells: Tensor, views: int, grid: tuple[int, int], side: int) -> tuple[Tensor, int]:
    """Returns the window `(G, N)` int64 of every token of `cells (G, N, 3)`, `side x side` cells of a view each, and how many there may be."""
    view, row, col = cells.unbind(-1)
    down, across = (-(-length // side) for length in grid)
    return (view * down + row // side) * across + col // side, views * down * across


def equal_shares(score: Tensor, window: Tensor, real: Tensor, local: Tensor, windows: int) -> Tensor:
    """Step 1: mask `(G, N)` of the best `local (G,)` tokens, shared over the windows by the tokens that they have, by largest remainder."""
    size = members(window, real, windows).sum(-1)
    return topk_per_part(score, window, real, quota(size.double(), size, local))


def capped(score: Tensor, window: Tensor, real: Tensor, local: Tensor, windows: int, number: Tensor | None = None) -> Tensor:
    """Step 1 without CLS: the best `local (G,)` tokens of which no window gives more than its equal part, rounded up; fewer where that is too few.

    `number (G,)` says how many windows there are; None counts those with a token.
    """
    number = members(window, real, windows).any(-1).sum(1) if number is None else number
    cap = (local + number - 1).div(number.clamp_min(1), rounding_mode="floor")
    return topk_mask(score, topk_per_part(score, window, real, cap[:, None].expand(-1, windows)), local)


@register_method("vscan")
@dataclass(frozen=True, kw_only=True)
class VScan(Method):
    """The default budget is what the paper's 64 leaves in the end, 32 of 576; positions are renumbered as the authors do."""

    ratio: float = 1 / 3
    layer: int | None = None
    shallow: int | None = None
    window: int | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "prefill")
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=32 / 576)
    published_positions: ClassVar[PositionOption] = "renumber"
    frames_unless_told: ClassVar[FrameOption] = "each"
    card: ClassVar[Card] = Card(
        title="VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
        paper="VScan, 2025",
        venue="TMLR 2026",
        arxiv="2505.22654",
        code="github.com/Tencent/SelfEvolvingAgent",
        signals="CLS attention of two tower layers, without CLS attention received there; queries and keys of one LLM layer, computed once more",
        cost="two q_cls K products, N x keep cosines; norm and projections of one LLM layer a second time and one attention row",
        settings={
            "ratio": "share of the boundary's tokens that the LLM layer leaves; 1 prunes at the boundary alone",
            "layer": "LLM layer from whose input on the rest is gone; None: half of the depth, the published 16 of 32 and 14 of 28",
            "shallow": "0-based tower layer of the local scores; None: 5 of 24 (the paper's 6th), same relative depth elsewhere",
            "window": "cells of a window's side; None: 6, or 4 where the tower joins patches",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"vscan: ratio must be above 0 and at most 1, got {self.ratio}; the paper uses 1/3")
        if self.window is not None and self.window < 1:
            raise ValueError(f"vscan: window must be 1 or more, got {self.window}; the paper uses 6")
        if self.shallow is not None and self.shallow < 0:
            raise ValueError(f"vscan: shallow must be a tower layer, 0 or more, got {self.shallow}; the paper's 6th is 5")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        early = round(geometry.tower_layers * 5 / 24) if self.shallow is None else self.shallow
        if early >= max(geometry.tower_layers, 1):
            raise ValueError(
                f"vscan: shallow={early} is not one of the tower's layers 0 to {geometry.tower_layers - 1}; the paper's 6th is 5"
            )
        needs = (
            (cls_row(early), cls_row(geometry.feature_layer))
            if geometry.has_cls
            else (received(early), received(geometry.tower_layers - 1))
        )
        side = (4 if geometry.joins > 1 else 6) if self.window is None else self.window
        scan = partial(self._scan, needs, side, geometry.has_cls)
        if self.ratio == 1:
            return (Merge(Boundary(), scan, tuple(dict.fromkeys(needs)), per="view"),)
        layer = geometry.llm_layers // 2 if self.layer is None else self.layer
        check_llm_layer(self.name, layer, geometry, 1)
        rows = next_queries(), next_keys()
        return (
            Merge(Boundary(), scan, tuple(dict.fromkeys(needs)), per="view", multiple=1 / self.ratio),
            Remove(Layer(layer), partial(_prune, rows), rows),
        )

    def _scan(self, needs: tuple[Signal, Signal], side: int, has_cls: bool, view: View) -> Selection:
        shallow, deep = (view.signals[need] for need in needs)
        window, windows = windows_of(view.cells, view.views, largest([grid for own in view.grids for grid in own]), side)
        find = equal_shares if has_cls else capped
        local = find(shallow, window, view.real, view.keep // 2, windows)
        kept = local | topk_mask(deep, view.real & ~local, view.keep - local.sum(1), most=view.most)
        return joined(join_nearest(view.tokens, None, kept, view.real & ~kept, kept, view.most, full=view.full), view)


def _prune(needs: tuple[Signal, Signal], view: View) -> Selection:
    assert view.text is not None
    query, key = (view.signals[need] for need in needs)
    scaling = view.scaling.get(needs[0])
    row = last_token_row(query.visual, query.text, key.visual, key.text, view.real, view.text.real, view.row, scaling=scaling)
    return Selection(keep=topk_mask(row, view.real, view.keep))
