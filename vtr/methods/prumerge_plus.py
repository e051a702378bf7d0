"""PruMerge+: PruMerge, and tokens spread evenly over the image kept beside the most attended ones.

Paper: Shang et al., ICCV 2025, arXiv 2403.15388, Section 3.
Code:  github.com/42Shawn/LLaVA-PruMerge at 097c041, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary, before the projector. Reads: CLS query and keys of the last tower layer. Batch: any. Deterministic: yes.

1. The attention of a token is that of the CLS query in the last tower layer, computed as one head of the full width.
2. Adaptive: the m outliers above `Q3 + 1.5 (Q3 - Q1)` of the view are kept, and of its N tokens in raster order every s-th from the first,
   the last one excepted, with s = floor(floor(N / m) / 3): about four times as many. With a budget: the best `(keep - 1) / 4`, rounded, and
   evenly spaced ones among the others, keep - 1 together.
3. To each kept token the 32 tokens with the most similar keys (cosine, kept or not) are added, each times its attention.
4. One more token holds the sum of all tokens that are not kept, each times its attention.

Paper to code: m -> number by attention, a_j -> attention, k -> neighbours.
Departures: those of PruMerge. Without outliers s is that of one outlier, where the code divides by zero; s is at least 1, where the code
stops; the budget is ours, the code's fixed ratio keeps some tokens twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.methods._prumerge import Chosen, Merging, outliers
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import Card, Stage

SHARE = 0.25  # of the tokens kept with a budget, chosen by attention: the adaptive 35 of 144 in the authors' setting


def prumerge_plus(attention: Tensor, real: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens are kept and take in their neighbours; one more is made of the rest.

    Args:
        attention: `(G, N)`, as `vtr.ops.nearest_sum.one_head_row` gives it.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64 tokens in the end, the extra one included; None: as many as outliers ask for.

    Returns:
        Masks `(G, N)` bool of the tokens kept by attention and of those kept for their place, disjoint; with a budget `keep - 1` together.
    """
    number = real.sum(1)
    if keep is None:
        top = outliers(attention, real)
        step = (number // top.sum(1).clamp_min(1) // 3).clamp_min(1)[:, None]
        place = real.long().cumsum(1) - 1
        return top, real & ~top & (place % step == 0) & (place < (number - 1).clamp_min(1)[:, None])
    kept = (keep - 1).clamp_min(0)
    top = topk_mask(attention, real, (kept.double() * SHARE).round().long())
    others = real & ~top
    size, wanted = others.sum(1, keepdim=True).clamp_min(1), (kept - top.sum(1))[:, None]
    place = others.long().cumsum(1) - 1
    # number i of the spread ones stands at floor((i + 1/2) size / wanted)
    before = (2 * place * wanted + size - 1) // (2 * size)
    until = (2 * (place + 1) * wanted + size - 1) // (2 * size)
    return top, others & (until > before)


@register_method("prumerge_plus")
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(Merging):
    """Adaptive by default, about 25 % of the tokens on LLaVA-1.5; positions are renumbered as the authors do."""

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    card: ClassVar[Card] = Card(
        title="LLaVA-PruMerge+: adaptive token reduction with spatially uniform samples",
        paper="Shang et al., 2024",
        venue="ICCV 2025",
        arxiv="2403.15388",
        code="github.com/42Shawn/LLaVA-PruMerge",
        signals="CLS attention and keys of the last tower layer",
        cost="one q_cls K product, kept x N key similarities",
        needs_cls=True,
        settings={
            "neighbours": "tokens that each kept token takes in",
            "compat": "'authors': tokens by falling attention, then the spread ones, the extra one last; refused for AnyRes",
        },
    )

    def choose(self, attention: Tensor, real: Tensor, keep: Tensor | None, most: int) -> Chosen:
        top, spread = prumerge_plus(attention, real, keep)
        return Chosen(top, spread, most - 1 if keep is not None else most)
