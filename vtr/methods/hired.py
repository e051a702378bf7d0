"""HiRED: share the budget of an AnyRes image out over its crops by early CLS attention, choose inside a crop by late CLS attention.

Paper: Arif et al., AAAI 2025, arXiv 2408.10945, Equations 1 and 2, Algorithm 1.
Code:  github.com/hasanar1f/HiRED at 502d6dd, MIT: nothing copied, checked against its outputs.
Stage: boundary, before the projector. Reads: CLS rows of tower layer 0 and of the feature layer. Batch: any. Deterministic: yes.

1. The thumbnail gets `floor(alpha keep)` tokens, the crops together the rest.
2. A crop's score is the attention that the thumbnail's CLS token pays, in tower layer 0, to the patches lying where the crop lies.
3. The crops share their part of the budget in proportion to their scores.
4. Every view keeps its best tokens by its own CLS attention in the tower layer whose output is used, summed over heads.
5. An image of one view keeps its best `keep` tokens.

Paper to code: token budget -> keep, alpha -> alpha, s_i -> block_sums, initial and final layer -> early, late.
Departures: shares are rounded by largest remainder and what a full crop cannot take goes to the others, so that exactly `keep` stay (the
paper rounds down); the thumbnail shows the image without padding, so its patches are laid over the unpadded region of the canvas; padding
is no candidate. The released code (`compat="authors"`, pure functions) counts the top patches in equal strips of the flattened thumbnail
instead of summing attention over blocks, and stitches grids that are not square transposed, which throws tokens away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.canvas import block_sums, of_crops, shown_blocks, valid_region
from vtr.ops.grids import largest
from vtr.ops.parts import Board, board
from vtr.ops.topk import quota, ranked, topk_mask
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
from vtr.types.geometry import check_crops
from vtr.types.signals import cls_row


def hired(late: Tensor, early: Tensor, board: Board, blocks: Tensor, keep: Tensor, most: int, alpha: float = 0.5) -> Tensor:
    """Budget per view, then the best of every view.

    Args:
        late: `(G, N)` CLS attention of the feature layer, higher stays.
        early: `(G, N)` CLS attention of the early layer.
        board: where tokens lie; view 0 is the thumbnail or only view, then come the crops in raster order.
        blocks: `(G, 2, crops, S)` what each crop shows of the thumbnail, from `shown_blocks`.
        keep: `(G,)` int64, `keep <= board.real.sum(1)`.
        most: `keep.max()` or more, a Python int.
        alpha: share of the thumbnail.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row. No host sync.
    """
    laid = board.lay(ranked(late), -torch.inf)
    score = block_sums(board.lay(early, 0)[:, 0], blocks)
    return board.topk(laid, budgets(score, (laid > -torch.inf).sum((2, 3)), keep, alpha), most)


def budgets(crop_score: Tensor, capacity: Tensor, keep: Tensor, alpha: float) -> Tensor:
    """Steps 1 and 3: tokens of the thumbnail and of each crop, `(G, 1 + C)` int64 with row sums `keep`.

    Args:
        crop_score: `(G, C)` float64.
        capacity: `(G, 1 + C)` int64, tokens that each view has.
        keep: `(G,)` int64.
        alpha: share of the thumbnail.
    """
    wanted = torch.minimum((keep.double() * alpha).long(), capacity[:, 0])
    crops = quota(crop_score, capacity[:, 1:], keep - wanted)
    return torch.cat([keep[:, None] - crops.sum(1, keepdim=True), crops], 1)


@register_method("hired")
@dataclass(frozen=True, kw_only=True)
class HiRED(Method):
    """The default budget is the paper's 20 %; positions are renumbered as the authors do."""

    alpha: float = 0.5
    early: int = 0
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    frames_only: ClassVar[FrameOption | None] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.2)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models",
        paper="Arif et al., 2024",
        venue="AAAI 2025",
        arxiv="2408.10945",
        code="github.com/hasanar1f/HiRED",
        signals="CLS attention of tower layer 0 and of the feature layer",
        cost="two q_cls K products, one sort per view",
        needs_cls=True,
        settings={
            "alpha": "share of the budget that the thumbnail gets",
            "early": "tower layer whose CLS attention shares the rest out over the crops; the paper's is the first, 0",
            "compat": "'authors': the released counts and stitching; refused for AnyRes, where they differ, outside the pure functions",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"hired: alpha must be from 0 to 1, got {self.alpha}; the paper uses 0.5")
        if self.early < 0:
            raise ValueError(f"hired: early must be a tower layer, 0 or more, got {self.early!r}; the paper uses the first, 0")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        check_crops("hired", geometry)
        if self.early >= geometry.tower_layers:
            raise ValueError(
                f"hired: early={self.early} is not one of the tower's layers 0 to {geometry.tower_layers - 1}; the paper uses 0"
            )
        if self.compat == "authors" and geometry.anyres:
            raise VtrError(
                f"hired: compat='authors' spends budget on the padding of AnyRes images and transposes their crops, which host "
                f"{geometry.host!r} does not offer; it runs in scripts/replay only; leave compat out"
            )
        early, late = cls_row(self.early), cls_row(geometry.feature_layer)
        needs = (early, late) if geometry.anyres else (late,)
        return (Remove(Boundary(before_projector=True), lambda view: self._select(view, early, late), needs),)

    def _select(self, view: View, early: Signal, late: Signal) -> Selection:
        crops, device = max(rows * cols for rows, cols in view.crop_grids), view.real.device
        if not crops:
            return Selection(keep=topk_mask(view.signals[late], view.real, view.keep, (view.counts, view.keeps)))
        grids = [view.grid(group) for group in range(len(view.grids))]
        side = max(largest(grids))
        keys = [(view.crop_grids[group], grids[group], _region(view, group), crops, side) for group in range(len(grids))]
        lies, blocks = board(view.cells, view.real, 1 + crops, side), of_crops(shown_blocks, keys, device)
        return Selection(keep=hired(view.signals[late], view.signals[early], lies, blocks, view.keep, view.most, self.alpha))


def _region(view: View, group: int) -> tuple[int, ...]:
    """Returns the unpadded part of the canvas of one image; the whole canvas where the host does not know the image's size."""
    grid, size, patches = view.crop_grids[group], view.image_sizes[group], view.grid(group)
    if min(grid) > 0 and min(size) > 0:
        return tuple(valid_region(size, grid, patches, 7))
    return 0, grid[0] * patches[0], 0, grid[1] * patches[1]
