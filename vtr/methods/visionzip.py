"""VisionZip: keep the tokens that CLS attends to, and merge the others into evenly spaced ones by their keys.

Paper: Yang et al., CVPR 2025, arXiv 2412.04467, Section 3.
Code:  github.com/dvlab-research/VisionZip at 3151f6d, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary, before the projector, or behind one that joins patches. Reads: CLS row, keys and output of the feature layer. Batch: any.

1. The dominant tokens are those with the most attention from CLS in the tower layer whose output is used, summed over heads.
2. Of the R other tokens, in position order, numbers 0, s, 2s, ... with s = R // contextual are pivots, as many as `contextual`.
3. Every remaining token goes to the pivot whose key (mean over heads) has the highest cosine with its own.
4. A pivot becomes itself plus the mean of the tokens that came to it: their sum over their number, the pivot not among them.
5. Each view of an AnyRes image is treated alike, with its share of the budget.

Paper to code: K dominant -> keep - contextual, M contextual -> contextual. contextual = keep * 10 / 64, rounded, as in all budgets of the paper.
Departures: the CLS token is no visual token, so the budget is patches only (the code counts CLS as dominant); pivots stay at their own
place, where the code appends them; padding of AnyRes images is no candidate and newline tokens stay. As in the code and unlike the text of the
paper, a pivot is added to the mean of its sources (`merge="mean"` averages the group). Without a CLS token the score is the attention
received from all tokens. Where several patches become a token (Qwen-VL), that of its patches is added up, keys are their mean, and it happens
behind the projector, as in LightCompress's port for Qwen2.5-VL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.methods._joined import joined
from vtr.ops.gather import left_align, take
from vtr.ops.joining import Joined, Sum, join_nearest
from vtr.ops.received import attention_received
from vtr.ops.topk import Known, topk_mask
from vtr.registry import register_method
from vtr.types import (
    Boundary,
    Budget,
    Card,
    FrameOption,
    Geometry,
    Merge,
    Method,
    PositionOption,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    VtrError,
)
from vtr.types.signals import cls_row, keys, queries, received


def visionzip(
    tokens: Tensor,
    metric: Tensor,
    score: Tensor,
    real: Tensor,
    keep: Tensor,
    contextual: Tensor,
    most: int,
    merge: Sum = "add",
    known: Known | None = None,
) -> Joined:
    """Dominant tokens, and pivots that the other tokens merge into.

    Args:
        tokens: `(G, N, D)`, one row per view, any float dtype.
        metric: `(G, N, d)`, compared by cosine in float32; keys averaged over heads.
        score: `(G, N)` attention from CLS, higher stays.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        contextual: `(G,)` int64, how many of `keep` are pivots, at most `keep`.
        most: at least `contextual.max()` and 1, a Python int.
        merge: `add` or `mean`, see step 4.
        known: `real.sum(1)` and `keep - contextual`, as for `topk_mask`.

    Returns:
        `Joined`: kept tokens in position order, `(G, K)` int64 (what follows a row's own is arbitrary), their values `(G, K, D)`, and
        `assign (G, N)` int64. `O(N most d)`.
    """
    dominant, n = topk_mask(score, real, keep - contextual, known), real.shape[1]
    width = n if known is None else min(max(known[1], default=0) + most, n)
    rest = real & ~dominant
    step = (rest.sum(1) // contextual.clamp_min(1)).clamp_min(1)[:, None]
    number = rest.cumsum(1) - 1
    pivot = rest & (number % step == 0) & (number // step < contextual[:, None])
    kept = dominant | pivot
    full = known is not None and set(known[0]) == {n}
    _, made, assign = join_nearest(tokens, metric, pivot, rest & ~pivot, kept, most, merge, full)
    index, _ = left_align(kept, width)
    merged = pivot.gather(1, index)
    slot = (merged.cumsum(1) - 1).clamp(0, made.shape[1] - 1)  # pivots stand in position order in both
    return Joined(index, torch.where(merged[..., None], take(made, slot), take(tokens, index)), assign)


def contextual_count(keep: Tensor, share: float) -> Tensor:
    """How many of `keep (G,)` tokens are pivots, rounded half to even."""
    return (keep.double() * share).round().long()


@register_method("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """Training-free VisionZip; the default budget is a third, the 192 of 576 of the paper. Positions are renumbered as the authors do."""

    contextual: float = 10 / 64
    merge: Sum = "add"
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        paper="Yang et al., 2024",
        venue="CVPR 2025",
        arxiv="2412.04467",
        code="github.com/dvlab-research/VisionZip",
        signals="CLS attention and keys of the feature layer; without CLS its queries and keys",
        cost="one q_cls K product of one tower layer, N x contextual key similarities",
        settings={
            "contextual": "share of the budget that are pivots with others merged in; 0 prunes only",
            "merge": "add: pivot plus the mean of its sources, as the code does; mean: average of the group, as the paper reads",
            "compat": "'authors': CLS as a token and pivots at the end; pure functions and replay only",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual <= 1:
            raise ValueError(f"visionzip: contextual must be from 0 to 1, got {self.contextual}; the paper's splits are 10/64")
        if self.merge not in ("add", "mean"):
            raise ValueError(f"visionzip: merge must be 'add' or 'mean', got {self.merge!r}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat == "authors":
            raise VtrError(
                "visionzip: compat='authors' hands the CLS token to the LLM, which is no patch of the image; it runs in "
                "scripts/replay only; leave compat out to reduce a model"
            )
        layer = geometry.feature_layer
        joins = geometry.joins
        paid = cls_row(layer) if geometry.has_cls else received(layer) if joins > 1 else queries(layer, tower=True)
        needs = keys(layer, tower=True), paid
        where = Boundary(before_projector=joins == 1)
        return (Merge(where, lambda view: self._select(view, joins, *needs), needs, per="view"),)

    def _select(self, view: View, joins: int, keys: Signal, score: Signal) -> Selection:
        key, attention = view.signals[keys], view.signals[score]
        if score.kind == "q":
            attention = attention_received(attention, key, view.real, scaling=view.scaling.get(score))
        contextual = contextual_count(view.keep, self.contextual)
        most = round(view.most * self.contextual)
        if not most:
            return Selection(keep=topk_mask(attention, view.real, view.keep, (view.counts, view.keeps)))
        metric = key.float().mean(2)
        if joins > 1:  # keys of the patches of a token, side by side
            metric = metric.unflatten(-1, (joins, -1)).mean(-2)
        known = view.counts, [keep - round(keep * self.contextual) for keep in view.keeps]
        return joined(visionzip(view.tokens, metric, attention, view.real, view.keep, contextual, most, self.merge, known), view)
