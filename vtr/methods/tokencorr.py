"""TokenCorrCompressor: how many tokens a crop keeps follows from how repetitive it is; which ones, from what CLS attends to.

Paper: Zhang et al., arXiv 2407.14439 (documents, mPLUG-DocOwl1.5).
Code:  announced at github.com/JiuTian-VL/TokenCorrCompressor, at 0773758 a figure only. Experimental: thresholds and layers are not published,
       the published numbers are from a model trained with the compressor, nothing here was checked against the authors.
Stage: boundary, before the projector. Reads: keys and CLS row of a low tower layer, CLS row of the feature layer. Batch: any.

1. In each view, a patch is redundant if more than rho of the others have a low-layer key with a cosine to its own above alpha. The information
   density d of the view is the share of its patches that are not redundant.
2. Local: `round(d N)` patches by the CLS attention of the low layer, the most probable or (`seed`) drawn without replacement.
3. Global: patches whose CLS attention in the deep layer is above `Q3 + 1.5 (Q3 - Q1)`.
4. Both sets stay, in their order; nothing is merged.
5. With a budget (ours): it is shared over the views in proportion to their informative patches d N; a view keeps its global patches first, the
   most attended before others, then patches as in step 2.

Paper to code: information density -> density. alpha, rho -> same names; their values, the layers and the rounding are placeholders of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.hashing import random_key
from vtr.ops.outliers import upper_fence
from vtr.ops.parts import members, part_sum, topk_per_part
from vtr.ops.topk import quota, topk_mask
from vtr.registry import register_method
from vtr.types import Boundary, Card, FrameOption, Geometry, Method, Observe, PositionOption, Remove, Selection, Signal, Stage, Step, View
from vtr.types.signals import cls_row, keys

NOTES = "tokencorr"  # density, priority and local chance of each token


def similar_counts(keys: Tensor, real: Tensor, alpha: float) -> Tensor:
    """How many other real tokens have a key `(G, N, C)` whose cosine to a token's own is above alpha: `(G, N)` int64. `O(N^2 C)`."""
    unit = F.normalize(keys if keys.dtype == torch.float64 else keys.float(), dim=-1)
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return ((unit @ unit.mT > alpha) & ~itself & real[:, None] & real[..., None]).sum(2)


def information_density(similar: Tensor, real: Tensor, rho: float) -> Tensor:
    """Step 1: `(G,)` float64 from `similar_counts (G, N)`; 0 for a row without tokens."""
    number = real.sum(1)
    redundant = (similar > rho * (number - 1)[:, None].double()) & real
    return (number - redundant.sum(1)).double() / number.clamp_min(1)


def distribution(row: Tensor, real: Tensor) -> Tensor:
    """A CLS row `(G, N)` without what CLS paid to itself: non-negative, summing to 1 over the real tokens, float64."""
    row = torch.where(real, row.double(), 0)
    return row / row.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def local_number(density: Tensor, real: Tensor) -> Tensor:
    """`round(d N)`, half up, at least 1: `(G,)` int64."""
    number = real.sum(1)
    return torch.minimum((density * number + 0.5).floor().long().clamp_min(1), number)


def tokencorr(density: Tensor, chance: Tensor, deep: Tensor, real: Tensor, factor: float = 1.5) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3.

    Args:
        density: `(G,)` of each view.
        chance: `(G, N)`, higher is taken first: the low layer's distribution, over an exponential draw where patches are sampled.
        deep: `(G, N)` the deep layer's distribution.
        real: `(G, N)` bool.
        factor: of the inter-quartile range.

    Returns:
        Masks `(G, N)` bool of local and of global patches; what stays is their union. `O(N log N)`, no host sync.
    """
    return topk_mask(chance, real, local_number(density, real)), (deep > upper_fence(deep, real, factor)[:, None]) & real


def tokencorr_budget(density: Tensor, priority: Tensor, part: Tensor, real: Tensor, keep: Tensor, parts: int) -> Tensor:
    """Step 5, one row per image.

    Args:
        density: `(G, N)` of the view of each token.
        priority: `(G, N)`, higher stays within a view.
        part: `(G, N)` int64 view of each token.
        real: `(G, N)` bool.
        keep: `(G,)` int64.
        parts: the most views of an image, a Python int.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row.
    """
    member = members(part, real, parts)
    return topk_per_part(priority, part, real, quota(part_sum(density, member), member.sum(-1), keep))


@register_method("tokencorr")
@dataclass(frozen=True, kw_only=True)
class TokenCorr(Method):
    """Adaptive by default; with a budget a variant of ours. Experimental."""

    alpha: float = 0.8
    rho: float = 0.05
    low: int | None = None
    seed: int | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    takes_budget: ClassVar[bool] = True
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding",
        paper="Zhang et al., 2024",
        venue="preprint",
        arxiv="2407.14439",
        code="github.com/JiuTian-VL/TokenCorrCompressor (no code released)",
        signals="keys and CLS attention of a low tower layer, CLS attention of the feature layer",
        cost="N x N key similarities per view, two q_cls K products",
        needs_cls=True,
        experimental=True,
        settings={
            "alpha": "cosine above which two patches are alike; not published, to be calibrated on documents",
            "rho": "share of alike patches above which one is redundant; not published, to be calibrated",
            "low": "tower layer of the local branch; None: a quarter of the way to the feature layer; not published",
            "seed": "None takes the most probable patches, a number draws them at random as in the paper",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.alpha <= 1:
            raise ValueError(f"tokencorr: alpha must be a cosine from -1 to 1, got {self.alpha}")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"tokencorr: rho must be a share from 0 to 1, got {self.rho}")
        if self.low is not None and self.low < 0:
            raise ValueError(f"tokencorr: low must be a tower layer, 0 or more, or None, got {self.low!r}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        low = geometry.feature_layer // 4 if self.low is None else self.low
        if low >= geometry.tower_layers:
            raise ValueError(f"tokencorr: low={low} is not one of the tower's layers 0 to {geometry.tower_layers - 1}")
        needs = keys(low, tower=True), cls_row(low), cls_row(geometry.feature_layer)
        where, exact = Boundary(before_projector=True), self.budget is not None
        kind = Observe if exact else Remove
        look = kind(where, lambda view: self._look(view, *needs, exact), needs, counted=False, per="view")
        return (look, Remove(where, _share_out)) if exact else (look,)

    def _look(self, view: View, key: Signal, local: Signal, deeper: Signal, exact: bool) -> Selection | None:
        density = information_density(similar_counts(view.signals[key].flatten(2), view.real, self.alpha), view.real, self.rho)
        chance, deep = (distribution(view.signals[row], view.real) for row in (local, deeper))
        if self.seed is not None:
            uniform = (random_key(self.seed, view.checksum, view.patch).double() + 0.5) / 2**53
            chance = chance / -uniform.log()
        near, far = tokencorr(density, chance, deep, view.real)
        if not exact:
            return Selection(keep=near | far)
        priority = torch.where(far, 2 + deep, chance / (1 + chance))  # both branches keep their order, the global one comes first
        view.per_token[NOTES] = torch.stack([density[:, None].expand_as(priority), priority], -1)
        return None


def _share_out(view: View) -> Selection:
    density, priority = view.per_token[NOTES].unbind(-1)
    return Selection(keep=tokencorr_budget(density, priority, view.cells[..., 0], view.real, view.keep, view.views))
