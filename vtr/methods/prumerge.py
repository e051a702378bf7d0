"""PruMerge: keep the tokens that CLS attends to far more than to others, and merge their neighbours into them.

Paper: Shang et al., ICCV 2025, arXiv 2403.15388, Section 3.
Code:  github.com/42Shawn/LLaVA-PruMerge at 097c041, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary, before the projector. Reads: CLS query and keys of the last tower layer. Batch: any. Deterministic: yes.

1. The attention of a token is that of the CLS query in the last tower layer, computed as one head of the full width.
2. Adaptive: tokens whose attention is an outlier, above `Q3 + 1.5 (Q3 - Q1)` of the view, are kept. With a budget: the best keep - 1.
3. To each kept token the 32 tokens with the most similar keys (cosine, kept or not) are added, each times its attention.
4. One more token holds the sum of all tokens that are not kept, each times its attention.

Paper to code: m -> number kept, a_j -> attention, k -> neighbours.
Departures: tokens stay in position order and the extra token takes the place of the most attended one that is not kept, where the code orders
by attention and appends it (`compat="authors"`); outliers are those of each view, not of the batch; keep = n changes nothing. As in
the code and unlike the paper: sums are not divided by their weights, neighbours are sought among all tokens, attention and keys are those of
the last layer while the tokens are those of the layer before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods._prumerge import Chosen, Merging, outliers
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import Card, Stage


def prumerge(attention: Tensor, real: Tensor, keep: Tensor | None) -> Tensor:
    """Which tokens are kept and take in their neighbours; one more is made of the rest.

    Args:
        attention: `(G, N)`, as `vtr.ops.nearest_sum.one_head_row` gives it.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64 tokens in the end, the extra one included; None: as many as are outliers.

    Returns:
        Mask `(G, N)` bool with `keep - 1` True per row; ties go to the lowest index.
    """
    return outliers(attention, real) if keep is None else topk_mask(attention, real, (keep - 1).clamp_min(0))


@register_method("prumerge")
@dataclass(frozen=True, kw_only=True)
class PruMerge(Merging):
    """Adaptive by default, about 5.5 % of the tokens on LLaVA-1.5; positions are renumbered as the authors do."""

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    card: ClassVar[Card] = Card(
        title="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
        paper="Shang et al., 2024",
        venue="ICCV 2025",
        arxiv="2403.15388",
        code="github.com/42Shawn/LLaVA-PruMerge",
        signals="CLS attention and keys of the last tower layer",
        cost="one q_cls K product, kept x N key similarities",
        needs_cls=True,
        settings={
            "neighbours": "tokens that each kept token takes in",
            "compat": "'authors': tokens by falling attention, the extra one last; refused for AnyRes",
        },
    )

    def choose(self, attention: Tensor, real: Tensor, keep: Tensor | None, most: int) -> Chosen:
        kept = prumerge(attention, real, keep)
        return Chosen(kept, torch.zeros_like(kept), most - 1 if keep is not None else most // 4 + 1)
