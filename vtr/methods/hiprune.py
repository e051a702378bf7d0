"""HiPrune: keep what a middle layer of the tower looks at, its neighbours, and what a deep layer looks at.

Paper: HiPrune, ACL 2026 (Findings), arXiv 2508.00553.
Code:  github.com/Danielement321/HiPrune at 6e83a12, MIT: nothing copied, checked against its outputs.
Stage: boundary. Reads: attention received in a middle layer and in the feature layer of the tower. Batch: any. Deterministic: yes.

1. A token's score in a layer is the attention it receives there, mean over heads and over all tokens that ask, CLS among them.
2. Anchors are the best round(keep x alpha / 5) tokens of the middle layer.
3. Buffers are the tokens left, right, above and below an anchor. Anchor after anchor, best first, itself and its buffers stay.
4. Registers fill the budget: the best of the other tokens in the layer whose output is used.
5. Each view of an AnyRes image is treated alike, with its share of the budget.

Paper to code: l -> layer + 1, N' -> keep, alpha -> alpha. The middle layer is the 9th of 24 in towers with CLS and the 16th of 32 in others, at the
same relative depth in towers of another size.
Departures: neighbours are real ones (the code steps in the raster order, so that left of a row's first token is the end of the row above, and
beyond the image is its first or last token); anchors and buffers end at the budget (the code stops with an error); registers are never anchors
or buffers (on Qwen2.5-VL the code takes some twice and keeps fewer); views share by largest remainder (the code rounds down). `compat="authors"`
has the code's neighbours. The padding of AnyRes images is neither a candidate nor a neighbour; newline tokens stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.canvas import on_device
from vtr.ops.clusters import constant
from vtr.ops.grids import largest
from vtr.ops.topk import ranked, topk_mask
from vtr.registry import register_method
from vtr.types import (
    Boundary,
    Budget,
    Card,
    FrameOption,
    Geometry,
    Method,
    PositionOption,
    Remove,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    VtrError,
)
from vtr.types.signals import received

BESIDE = ((0, -1), (0, 1), (-1, 0), (1, 0))
"""Rows and columns from an anchor to its buffers: left, right, above, below."""


def anchor_count(keep: int, alpha: float) -> int:
    """Returns the number of anchors of a budget, rounded half to even."""
    return round(keep * alpha / 5)


def neighbours(cells: Tensor, real: Tensor, views: int, grid: tuple[int, int]) -> Tensor:
    """Returns where each token's neighbours are: left, right, above, below.

    Args:
        cells: `(G, N, 3)` int64 view, row, column.
        real: `(G, N)` bool.
        views: the most views of a group.
        grid: the most rows and columns of a view.

    Returns:
        `(G, N, 4)` int64 into N; N where there is no real token.
    """
    (groups, n), (rows, cols) = real.shape, grid
    view, row, col = cells.unbind(-1)
    area = views * rows * cols
    table = torch.full((groups, area + 1), n, dtype=torch.int64, device=real.device)  # the last entry stays none
    at = torch.where(real, (view * rows + row) * cols + col, area)
    own = torch.where(real, torch.arange(n, device=real.device), n)
    table = table.scatter_(1, at, own)
    down, across = on_device(list(zip(*BESIDE, strict=True)), real.device)
    to_row, to_col = row[..., None] + down, col[..., None] + across  # (G, N, 4)
    inside = real[..., None] & (to_row >= 0) & (to_row < rows) & (to_col >= 0) & (to_col < cols)
    place = torch.where(inside, (view[..., None] * rows + to_row) * cols + to_col, area)
    return table.gather(1, place.flatten(1)).view_as(place)


def raster_neighbours(groups: int, n: int, cols: int, device: torch.device | None = None) -> Tensor:
    """Returns the released code's neighbours `(G, N, 4)` of whole views: steps in the raster order, ended at its first and last token."""
    steps = torch.tensor([down * cols + across for down, across in BESIDE], device=device)
    return (torch.arange(n, device=device)[:, None] + steps).clamp(0, n - 1).expand(groups, n, 4)


@constant
def whole_neighbours(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Returns the `neighbours` of the tokens of a whole view: `(1, N, 4)` int64."""
    rows, cols = grid
    cells = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(cols))[None]
    return neighbours(cells, torch.ones(1, rows * cols, dtype=torch.bool), 1, grid).to(device)


def hiprune(
    shallow: Tensor,
    deep: Tensor,
    beside: Tensor,
    real: Tensor,
    keep: Tensor,
    anchors: Tensor,
    most: int,
    known: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Anchors and their buffers by one score, the rest by another.

    Args:
        shallow: `(G, N)` score of the middle layer, higher is better.
        deep: `(G, N)` score of the deep layer.
        beside: `(G, N, P)` int64 into N, buffers of each token if it is an anchor; N for none. `(1, N, P)` where all rows have the same.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        anchors: `(G,)` int64, how many anchors.
        most: `anchors.max()` or more, a Python int.
        known: `real.sum(1)`, `keep` and `anchors` as Python ints, where the host knows them.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row, and the mask of anchors and buffers in it. Ties: lowest index.
        `O(N log N)`, no host sync.
    """
    counts, keeps, numbers = known or ((), (), ())
    if most:
        chosen = topk_mask(shallow, real, anchors, known and (counts, numbers), most)
        near = _with_buffers(chosen, shallow, beside, real, keep, min(most, real.shape[1]), min(keeps, default=0))
    else:
        near = torch.zeros_like(real)
    first = torch.where(near, torch.inf, deep.nan_to_num(-torch.inf))  # infinity becomes a number
    return topk_mask(first, real, keep, known and (counts, keeps)), near


def _with_buffers(chosen: Tensor, shallow: Tensor, beside: Tensor, real: Tensor, keep: Tensor, most: int, least: int) -> Tensor:
    n = real.shape[1]
    index = chosen.view(torch.uint8).topk(most).indices  # (G, A)
    fits = most * (1 + beside.shape[2]) <= least  # anchors and buffers of every row are within its budget
    if not fits:
        index = index.sort(1).values  # of equally good ones the first
        score = torch.where(chosen, ranked(shallow), -torch.inf)
        index = index.gather(1, score.gather(1, index).argsort(dim=1, descending=True, stable=True))
    around = beside.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, beside.shape[2]))
    turn = torch.cat([index[..., None], around], 2)  # (G, A, 1 + P): the order in which they are taken
    turn = torch.where(chosen.gather(1, index)[..., None], turn, n).flatten(1)
    if fits:
        return torch.zeros(len(real), n + 1, dtype=torch.bool, device=real.device).scatter_(1, turn, True)[:, :n]
    when = torch.arange(turn.shape[1], device=real.device).expand_as(turn)
    never = turn.shape[1]
    first = torch.full((len(real), n + 1), never, device=real.device).scatter_reduce(1, turn, when, "amin")[:, :n]
    return topk_mask(-first.float(), real & (first < never), keep)


@register_method("hiprune")
@dataclass(frozen=True, kw_only=True)
class HiPrune(Method):
    """The default budget is a third, the paper's 192 of 576; positions are renumbered as the authors do."""

    alpha: float = 0.1
    layer: int | None = None
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    published_positions: ClassVar[PositionOption] = "renumber"
    frames_unless_told: ClassVar[FrameOption] = "each"
    card: ClassVar[Card] = Card(
        title="HiPrune: Hierarchical Attention for Efficient Token Pruning in Vision-Language Models",
        paper="HiPrune, 2025",
        venue="ACL 2026 Findings",
        arxiv="2508.00553",
        code="github.com/Danielement321/HiPrune",
        signals="attention received in a middle layer and in the feature layer of the tower",
        cost="the attention maps of two tower layers once more, in chunks of queries; two sorts of N",
        settings={
            "alpha": "share of the budget that anchors and their neighbours may take; 0 keeps the best of the deep layer",
            "layer": "0-based tower layer of the anchors; None: at 9/24 of the depth with CLS, at 16/32 without (the paper's l, minus 1)",
            "compat": "'authors': neighbours in the raster order, which wrap around; refused where views share a budget and without CLS",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"hiprune: alpha must be from 0 to 1, got {self.alpha}; the paper uses 0.1")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"hiprune: layer must be a tower layer, 0 or more, got {self.layer}; the paper's l = 9 is layer=8")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.layer is not None and self.layer >= geometry.tower_layers:
            raise ValueError(
                f"hiprune: layer={self.layer} is not one of the tower's layers 0 to {geometry.tower_layers - 1}; the paper's l = 9 is layer=8"
            )
        if self.compat and (geometry.anyres or geometry.tiles or not geometry.has_cls):
            raise VtrError(
                f"hiprune: compat='authors' keeps fewer tokens than asked for on {geometry.host!r}, where shares of views are rounded down or "
                "tokens are taken twice; it runs in scripts/replay only; leave compat out"
            )
        depth = 9 / 24 if geometry.has_cls else 16 / 32
        layer = max(round(geometry.tower_layers * depth) - 1, 0) if self.layer is None else self.layer
        shallow, deep = received(layer), received(geometry.feature_layer)
        needs = tuple(dict.fromkeys((shallow, deep) if self.alpha else (deep,)))
        return (Remove(Boundary(), lambda view: self._select(view, shallow, deep), needs, per="view"),)

    def _select(self, view: View, shallow: Signal, deep: Signal) -> Selection:
        late = view.signals[deep]
        early = view.signals[shallow] if self.alpha else late
        number = [anchor_count(keep, self.alpha) for keep in view.keeps]
        grids = [grid for own in view.grids for grid in own]
        whole = (
            (view.views == 1 or view.only is not None)
            and len({*grids}) == 1
            and {math.prod(grids[0])} == {view.real.shape[1], *view.counts}
        )
        if self.compat:
            if not whole:
                raise VtrError(
                    "hiprune: compat='authors' needs whole images of one grid; leave compat out for videos and behind other methods"
                )
            beside = raster_neighbours(len(view.real), view.real.shape[1], grids[0][1], view.real.device)
        elif whole:
            beside = whole_neighbours(grids[0], view.real.device)
        else:
            beside = neighbours(view.cells, view.real, view.views, largest(grids))
        anchors, known = on_device([number], view.real.device)[0], (view.counts, view.keeps, number)
        return Selection(keep=hiprune(early, late, beside, view.real, view.keep, anchors, max(number, default=0), known)[0])
