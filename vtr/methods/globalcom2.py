"""GlobalCom²: the thumbnail of an AnyRes image says how many and which tokens its crops keep.

Paper: Liu et al., AAAI 2026, arXiv 2501.05179 v6.
Code:  github.com/xuyang-liu16/GlobalCom2 at 96b2d00, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary. Reads: CLS logits of the last tower layer; without CLS the visual tokens. Batch: any.

1. The score of a token is its attention logit from CLS (before the softmax, mean over heads), or minus the cosine to its view's mean.
2. The thumbnail is cut into one block per crop; `softmax(block sum / tau)` over the crops says where the image is interesting.
3. The keep ratio of crop j is `R (1 + softmax_j - mean of the softmax)`, that of the thumbnail is R.
4. The thumbnail's scores are laid over the valid region of the canvas (bilinear), which gives every crop token a global score.
5. A crop keeps the best by sum of its local and global scores, each divided by its norm over the crop; the thumbnail by its own score.

Paper to code: R -> keep over valid tokens, s_j -> block_sums, sigma_j and r_j -> crop_shares, tau -> temperature, G_j -> global_scores.
Departure: counts are shared out by largest remainder so that the image keeps exactly `keep`, where the code cuts every part down to an
integer; tokens lie in their true cells and the thumbnail in raster order, where the code fills crops up from the left and orders the
thumbnail by score (`scripts/replay/globalcom2.py`). As in the code, logits replace the paper's softmax: sums of softmax scores differ too little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.canvas import block_sums, canvas_cells, on_device, resized_at, valid_region
from vtr.ops.grids import largest, sides
from vtr.ops.parts import extent, members, part_sum, topk_per_part
from vtr.ops.topk import quota
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, FrameOption, Geometry, Method, PositionOption, Remove, Selection, Stage, Step, View, VtrError
from vtr.types.geometry import check_crops
from vtr.types.signals import cls_row


def globalcom2(
    score: Tensor,
    cells: Tensor,
    real: Tensor,
    keep: Tensor,
    crop_grid: Tensor,
    crops: int,
    patch_grid: tuple[int, int],
    temperature: float,
    own: tuple[int, int] | Tensor | None = None,
) -> Tensor:
    """Allocates the budget to thumbnail and crops, and chooses inside each.

    Args:
        score: `(G, N)` local score of each token, higher stays; float32.
        cells: `(G, N, 3)` int64 view (0 = thumbnail, then crops in raster order), row, column; the thumbnail must be whole.
        real: `(G, N)` bool, True where a row has a token; padding of the canvas has none.
        keep: `(G,)` int64, `1 <= keep <= real.sum(1)`.
        crop_grid: `(G, 2)` int64 rows and columns of crops, zeros for a single view.
        crops: the most crops of a group, a Python int.
        patch_grid: `(rows, cols)` of a view, the largest where groups differ.
        temperature: of the softmax over crops.
        own: `(G, 2)` int64 rows and columns of each group's views where they differ.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row.
    """
    part = cells[..., 0]
    thumbnail = thumbnail_map(score, cells, real, patch_grid)
    share = F.pad(crop_shares(block_sums(thumbnail, crop_grid, crops, own), crop_grid, temperature), (1, 0), value=1.0)  # (G, 1 + crops)
    capacity = members(part, real, crops + 1).sum(-1)
    wanted = quota(share * capacity, capacity, keep)  # R is the same factor everywhere
    return topk_per_part(combined_scores(score, thumbnail, cells, real, crop_grid, crops, own), part, real, wanted)


def thumbnail_map(score: Tensor, cells: Tensor, real: Tensor, patch_grid: tuple[int, int]) -> Tensor:
    """Scores of the thumbnail on its grid, `(G, rows, cols)`; 0 in cells without a token."""
    rows, cols = patch_grid
    where = torch.where(real & (cells[..., 0] == 0), cells[..., 1] * cols + cells[..., 2], rows * cols)
    return score.new_zeros(len(score), rows * cols + 1).scatter_(1, where, score)[:, :-1].view(-1, rows, cols)


def crop_shares(sums: Tensor, crop_grid: Tensor, temperature: float) -> Tensor:
    """`r_j / R` of every crop before it is limited to 1: `(G, crops)` float64 from block sums `(G, crops)` float64."""
    number = crop_grid.prod(1, keepdim=True)
    there = torch.arange(sums.shape[1], device=sums.device) < number
    shifted = sums.masked_fill(~there, -torch.inf)
    top = shifted.amax(1, keepdim=True) if sums.shape[1] else shifted
    weight = torch.where(there, ((shifted - top) / temperature).exp(), 0)
    sigma = weight / (weight.sum(1, keepdim=True) + 1e-8)
    return torch.where(there, 1 + sigma - sigma.sum(1, keepdim=True) / number.clamp_min(1), 0)


def global_scores(thumbnail: Tensor, cells: Tensor, real: Tensor, crop_grid: Tensor, own: tuple[int, int] | Tensor | None = None) -> Tensor:
    """Returns the thumbnail map `(G, rows, cols)` resized to the valid region of the canvas and read at every crop token: `(G, N)`, 0 elsewhere.

    `own` is the size of the maps where that is smaller, as for `globalcom2`.
    """
    on_canvas = real & (cells[..., 0] > 0)
    row, col = canvas_cells(cells, crop_grid, (thumbnail.shape[1], thumbnail.shape[2]) if own is None else own)
    (top, bottom), (left, right) = (extent(at, on_canvas[:, None]) for at in (row, col))
    height, width = ((end - start).clamp_min(1)[:, 0] for start, end in ((top, bottom), (left, right)))
    spread = resized_at(thumbnail, row - top, col - left, height, width, own)
    return torch.where(on_canvas, spread, 0)


def combined_scores(
    score: Tensor,
    thumbnail: Tensor,
    cells: Tensor,
    real: Tensor,
    crop_grid: Tensor,
    crops: int,
    own: tuple[int, int] | Tensor | None = None,
) -> Tensor:
    """Returns what tokens are ranked by, `(G, N)`: local plus global score, each over its norm in the crop; in the thumbnail the local one."""
    part = cells[..., 0]
    spread = global_scores(thumbnail, cells, real, crop_grid, own)
    member = members(part, real, crops + 1)
    own_norm, global_norm = (part_sum(s.square(), member).sqrt().clamp_min(1e-12).gather(1, part) for s in (score, spread))
    return torch.where(part > 0, score / own_norm + spread / global_norm, score)


def similarity_scores(tokens: Tensor, cells: Tensor, real: Tensor, views: int) -> Tensor:
    """For towers without CLS: minus the cosine of each token to the mean of its view. `(G, N, D)` -> `(G, N)` float32."""
    wide, part = tokens.to(torch.promote_types(tokens.dtype, torch.float32)), cells[..., 0]
    member = members(part, real, views)
    mean = (member / member.sum(-1, keepdim=True).clamp_min(1)).to(wide.dtype) @ wide.masked_fill(~real[..., None], 0)  # (G, V, D)
    cosine = F.normalize(wide, dim=-1, eps=1e-12) @ F.normalize(mean, dim=-1, eps=1e-12).mT  # (G, N, V)
    return -cosine.gather(2, part[..., None]).squeeze(2)


@register_method("globalcom2")
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Method):
    """Thumbnail-guided compression; the default budget is the released default of 25 %."""

    score: Literal["auto", "cls", "similarity"] = "auto"
    temperature: float = 10.0
    allocation: Literal["thumbnail", "even"] = "thumbnail"
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    frames_only: ClassVar[FrameOption | None] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.25)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language Models",
        paper="Liu et al.: Global Compression Commander (GlobalCom²)",
        venue="AAAI 2026",
        arxiv="2501.05179",
        code="github.com/xuyang-liu16/GlobalCom2",
        signals="CLS logits of the last tower layer, or (score='similarity') the visual tokens",
        cost="one q_cls K product of one tower layer, two sorts of N",
        settings={
            "score": "cls: CLS logits; similarity: minus the cosine to the view's mean; auto: cls where the tower has a CLS token",
            "temperature": "of the softmax over crops; larger shares the budget out more evenly",
            "allocation": "thumbnail: crops share the budget by what the thumbnail finds interesting; even: by their size alone",
            "compat": "'authors': the released counts and token order; pure functions and replay only",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("auto", "cls", "similarity"):
            raise ValueError(f"globalcom2: score must be 'auto', 'cls' or 'similarity', got {self.score!r}")
        if not self.temperature > 0:
            raise ValueError(f"globalcom2: temperature must be above 0, got {self.temperature}; the paper uses 10")
        if self.allocation not in ("thumbnail", "even"):
            raise ValueError(f"globalcom2: allocation must be 'thumbnail' or 'even', got {self.allocation!r}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        check_crops("globalcom2", geometry)
        if self.compat == "authors":
            raise VtrError(
                "globalcom2: compat='authors' writes tokens into other cells than their own, which a method cannot ask of a model; it runs "
                "in scripts/replay only; leave compat out to reduce a model"
            )
        if self.score == "cls" and not geometry.has_cls:
            raise VtrError(f"globalcom2: score='cls' needs a CLS token, the tower of {geometry.host!r} has none; use score='similarity'")
        if self.score == "similarity" or not geometry.has_cls:
            return (Remove(Boundary(), self._select),)
        return (Remove(Boundary(), self._select, (cls_row(geometry.tower_layers - 1, softmax=False),)),)

    def _select(self, view: View) -> Selection:
        _check_whole(view)
        crops = max(rows * cols for rows, cols in view.crop_grids)
        if view.signals:
            (score,) = view.signals.values()
        else:
            score = similarity_scores(view.tokens, view.cells, view.real, view.views)
        grid, grids = on_device(view.crop_grids, view.real.device), [view.grid(group) for group in range(len(view.grids))]
        score = score.to(torch.promote_types(score.dtype, torch.float32)).nan_to_num()
        temperature = self.temperature if self.allocation == "thumbnail" else math.inf  # every crop the same share
        own = sides(grids, view.real.device)
        return Selection(keep=globalcom2(score, view.cells, view.real, view.keep, grid, crops, largest(grids), temperature, own))


def _check_whole(view: View) -> None:
    """Tokens missing here were removed by an earlier method; the thumbnail would have holes."""
    for group, (count, grid, size) in enumerate(zip(view.counts, view.crop_grids, view.image_sizes, strict=True)):
        if grid == (0, 0):
            continue
        patches = view.grid(group)
        area = patches[0] * patches[1]
        regions = [valid_region(size, grid, patches, digits) for digits in (None, 7)] if min(size) > 0 else []
        whole = {area + (bottom - top) * (right - left) for top, bottom, left, right in regions} or {count if count > area else area + 1}
        if count not in whole:
            raise VtrError(
                f"globalcom2: needs every token of thumbnail and crops, got {count} of {max(whole)} from an earlier method; put "
                "globalcom2 first in the plan and let the others follow it, at the boundary or at an LLM layer (dart, fastv, ...)"
            )
