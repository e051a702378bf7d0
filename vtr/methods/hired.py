"""HiRED: share the budget of an AnyRes image out over its crops by early CLS attention, choose inside a crop by late CLS attention.

Paper: Arif et al., AAAI 2025, arXiv 2408.10945, Equations 1 and 2, Algorithm 1.
Code:  github.com/hasanar1f/HiRED at 502d6dd, MIT: nothing copied, checked against its outputs.
Stage: boundary, before the projector. Reads: CLS rows of tower layer 0 and of the feature layer. Batch: any. Deterministic: yes.

1. The thumbnail gets `floor(alpha keep)` tokens, the crops together the rest.
2. A crop's score is the attention that the thumbnail's CLS token pays, in tower layer 0, to the patches lying where the crop lies.
3. The crops share their part of the budget in proportion to their scores.
4. Every view keeps its best tokens by its own CLS attention in the tower layer whose output is used, summed over heads.
5. An image of one view keeps its best `keep` tokens.

Paper to code: token budget -> keep, alpha -> alpha, s_i -> crop_scores, initial and final layer -> early, late.
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

from vtr.ops.canvas import on_device, rows_and_cols, valid_region
from vtr.ops.grids import sides
from vtr.ops.parts import members, topk_per_part
from vtr.ops.topk import Known, quota, topk_mask
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


def hired(
    late: Tensor, crop_score: Tensor, part: Tensor, real: Tensor, keep: Tensor, alpha: float = 0.5, known: Known | None = None
) -> Tensor:
    """Budget per view, then the best of every view.

    Args:
        late: `(G, N)` CLS attention of the feature layer, higher stays.
        crop_score: `(G, C)` of each crop, as `crop_scores` gives it; C is 0 when no image has crops.
        part: `(G, N)` int64, view of each token: 0 = thumbnail or only view, then the crops in raster order.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        alpha: share of the thumbnail.
        known: as for `topk_mask`.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row. `O(N log N)` per row, no host sync.
    """
    if not crop_score.shape[1]:
        return topk_mask(late, real, keep, known)
    capacity = members(part, real, crop_score.shape[1] + 1).sum(-1)  # (G, 1 + C)
    wanted = torch.minimum((keep.double() * alpha).long(), capacity[:, 0])
    crops = torch.minimum(keep - wanted, capacity[:, 1:].sum(1))
    budget = torch.cat([(keep - crops)[:, None], quota(crop_score, capacity[:, 1:], crops)], 1)
    return topk_per_part(late, part, real, budget)


def crop_scores(
    early: Tensor, cells: Tensor, real: Tensor, region: Tensor, crop_grid: Tensor, crops: int, patch_grid: tuple[int, int] | Tensor
) -> Tensor:
    """Step 2: attention of the thumbnail's patches, summed over the crop that the centre of each patch lies in.

    Args:
        early: `(G, N)` CLS attention of the early layer.
        cells: `(G, N, 3)` int64 view, row, column.
        real: `(G, N)` bool.
        region: `(G, 4)` int64 top, bottom, left, right of the unpadded part of the canvas, in patches.
        crop_grid: `(G, 2)` int64 rows and columns of crops, zeros for a single view.
        crops: the most crops of a group, a Python int.
        patch_grid: `(rows, cols)` of a view of all groups, or `(G, 2)` int64.

    Returns:
        `(G, crops)` float64; 0 where a group has fewer crops.
    """
    view, row, col = cells.unbind(-1)
    top, bottom, left, right = (edge[:, None] for edge in region.unbind(1))
    # twice the centre of a thumbnail patch on the canvas, times the patches of a side: integers, so that borders are exact
    rows, cols = rows_and_cols(patch_grid)
    down = (2 * top * rows + (2 * row + 1) * (bottom - top)) // (2 * rows * rows)
    across = (2 * left * cols + (2 * col + 1) * (right - left)) // (2 * cols * cols)
    crop = torch.where((view == 0) & (crop_grid[:, :1] > 0), down * crop_grid[:, 1:] + across, -1)
    member = (crop[:, None] == torch.arange(crops, device=crop.device)[:, None]) & real[:, None]  # (G, crops, N)
    return torch.where(member, early.double()[:, None], 0).sum(-1)


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
        cost="two q_cls K products, two sorts of N",
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
        crops, known = max(rows * cols for rows, cols in view.crop_grids), (view.counts, view.keeps)
        if crops and early in view.signals:
            regions = [_region(view, group) for group in range(len(view.crop_grids))]
            region, grid = (on_device(values, view.real.device) for values in (regions, view.crop_grids))
            patches = sides([view.grid(group) for group in range(len(view.grids))], view.real.device)
            score = crop_scores(view.signals[early], view.cells, view.real, region, grid, crops, patches)
        else:
            score = view.real.new_zeros((len(view.real), crops), dtype=torch.float64)
        return Selection(keep=hired(view.signals[late], score, view.cells[..., 0], view.real, view.keep, self.alpha, known))


def _region(view: View, group: int) -> list[int]:
    """Returns the unpadded part of the canvas of one image; the whole canvas where the host does not know the image's size."""
    grid, size, patches = view.crop_grids[group], view.image_sizes[group], view.grid(group)
    if min(grid) > 0 and min(size) > 0:
        return valid_region(size, grid, patches, 7)
    return [0, grid[0] * patches[0], 0, grid[1] * patches[1]]
