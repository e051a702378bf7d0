"""GlobalCom²: the thumbnail of an AnyRes image says how many and which tokens its crops keep.

Paper: Liu et al., AAAI 2026, arXiv 2501.05179 v6.
Code:  github.com/xuyang-liu16/GlobalCom2 at 96b2d00, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary. Reads: CLS logits of the last tower layer; without CLS the visual tokens. Batch: any.

1. The score of a token is its attention logit from CLS (before the softmax, mean over heads), or minus the cosine to its view's mean.
2. The thumbnail is cut into one block per crop; `softmax(block sum / tau)` over the crops says where the image is interesting.
3. The keep ratio of crop j is `R (1 + softmax_j - mean of the softmax)`, that of the thumbnail is R.
4. The thumbnail's scores are laid over the valid region of the canvas (bilinear), which gives every crop token a global score.
5. A crop keeps the best by sum of its local and global scores, each divided by its norm over the crop; the thumbnail by its own score.

Paper to code: R -> keep over valid tokens, s_j -> block_sums, sigma_j and r_j -> crop_shares, tau -> temperature, G_j -> spread_over.
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

from vtr.ops.canvas import Crops, block_sums, crops_of, spread_over, valid_region
from vtr.ops.grids import largest
from vtr.ops.parts import Board, board, members
from vtr.ops.topk import quota, ranked, topk_mask
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, FrameOption, Geometry, Method, PositionOption, Remove, Selection, Stage, Step, View, VtrError
from vtr.types.geometry import check_crops
from vtr.types.signals import cls_row


def globalcom2(score: Tensor, board: Board, keep: Tensor, crops: Crops, temperature: float, most: int) -> Tensor:
    """Allocates the budget to thumbnail and crops, and chooses inside each.

    Args:
        score: `(G, N)` local score of each token, higher stays; float32, finite.
        board: where tokens lie; view 0 is the thumbnail, which must be whole, then come the crops in raster order.
        keep: `(G,)` int64, `1 <= keep <= board.real.sum(1)`.
        crops: where they lie on the canvas.
        temperature: of the softmax over crops.
        most: `keep.max()` or more, a Python int.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row.
    """
    laid = board.lay(score, -torch.inf)
    there = laid > -torch.inf
    local = torch.where(there, laid, 0)
    share = F.pad(crop_shares(block_sums(local[:, 0], crops.blocks), crops.number, temperature), (1, 0), value=1.0)  # (G, 1 + crops)
    capacity = there.sum((2, 3))
    wanted = quota(share * capacity, capacity, keep)  # R is the same factor everywhere
    return board.topk(torch.where(there, ranked(combined_scores(local, there, crops)), -torch.inf), wanted, most)


def crop_shares(sums: Tensor, number: Tensor, temperature: float) -> Tensor:
    """`r_j / R` of every crop before it is limited to 1: `(G, crops)` float64 from block sums `(G, crops)` float64 of `number (G, 1)` crops."""
    there = torch.arange(sums.shape[1], device=sums.device) < number
    shifted = torch.where(there, sums, -torch.inf)
    top = shifted.amax(1, keepdim=True) if sums.shape[1] else shifted
    weight = torch.where(there, ((shifted - top) / temperature).exp(), 0)
    sigma = weight / (weight.sum(1, keepdim=True) + 1e-8)
    return torch.where(there, 1 + sigma - sigma.sum(1, keepdim=True) / number.clamp_min(1), 0)


def combined_scores(local: Tensor, there: Tensor, crops: Crops) -> Tensor:
    """Returns what tokens are ranked by: local plus global score, each over its norm in the crop; in the thumbnail the local one.

    Args:
        local: `(G, 1 + crops, S, S)` scores, 0 in cells without a token.
        there: `(G, 1 + crops, S, S)` bool, cells that have one.
        crops: where they lie on the canvas.
    """
    spread = torch.where(there[:, 1:], spread_over(local[:, 0], there[:, 1:], crops), 0)
    own, whole = (F.normalize(score.flatten(2), dim=2, eps=1e-12) for score in (local[:, 1:], spread))
    return torch.cat([local[:, :1], (own + whole).view_as(spread)], 1)


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
        cost="one q_cls K product of one tower layer, one sort per view",
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
        score = score.to(torch.promote_types(score.dtype, torch.float32)).nan_to_num()
        if not crops:
            return Selection(keep=topk_mask(score, view.real, view.keep, (view.counts, view.keeps)))
        grids = [view.grid(group) for group in range(len(view.grids))]
        side = max(largest(grids))
        lies, where = board(view.cells, view.real, 1 + crops, side), crops_of(view.crop_grids, grids, side, view.real.device)
        temperature = self.temperature if self.allocation == "thumbnail" else math.inf  # every crop the same share
        return Selection(keep=globalcom2(score, lies, view.keep, where, temperature, view.most))


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
