"""CDPruner: keep visual tokens that differ from each other and fit the question, by a determinantal point process.

Paper: Zhang et al., NeurIPS 2025, arXiv 2506.10967.
Code:  github.com/Theia-4869/CDPruner at 9541616, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary. Reads: visual tokens behind the projector, input embeddings of the instruction. Batch: any. Deterministic: yes.

1. The relevance of a visual token is its cosine to the mean input embedding of the instruction (the paper's rule for models without CLIP).
2. Relevances are scaled to 0 .. 1 over the image, all its crops together, plus a little so that none is 0.
3. The kernel is relevance x cosine of two visual tokens x relevance.
4. Greedy MAP: pick after pick, the token that makes the determinant of the kernel over the picks grow most.
5. The picks stay in their order. Every view of an AnyRes image has its own process and an equal share of the budget.

Paper to code: T -> keep, r -> quality, L -> cosines of `greedy_dpp`, theta -> theta.
Departures: for CLIP towers the published numbers use minus the cosine of CLIP's own embeddings to its text tower: `relevance="clip"`. When the
rank runs out the rest is picked by relevance, where the code picks one token again and again. The code scales over the whole batch. Padding of
AnyRes images is no candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods._relevance import Relevant
from vtr.ops.dpp import greedy_dpp
from vtr.ops.gather import index_to_mask
from vtr.registry import register_method
from vtr.types import Budget, Card, FrameOption, Stage


def balanced(quality: Tensor, theta: float | None) -> Tensor:
    """`exp(theta / (2 (1 - theta)) quality)`, the paper's balance between relevance and diversity; None leaves `quality` as it is."""
    return quality if theta is None else (theta / (2 * (1 - theta)) * quality).exp()


def cdpruner(tokens: Tensor, quality: Tensor, real: Tensor, keep: Tensor, most: int) -> Tensor:
    """Steps 3 and 4.

    Args:
        tokens: `(G, N, D)`, any float dtype; computed in float32 at least.
        quality: `(G, N)`, above 0.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, at most `real.sum(1)`.
        most: `keep.max()` or more, as a Python int.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row. Ties: lowest index.
    """
    order = greedy_dpp(tokens, quality, real, most)
    return index_to_mask(order, torch.arange(most, device=order.device) < keep[:, None], tokens.shape[1])


@register_method("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Relevant):
    """Conditional diversity; the default budget is the paper's 64 of 576."""

    theta: float | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 9)
    card: ClassVar[Card] = Card(
        title="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
        paper="Zhang et al., 2025",
        venue="NeurIPS 2025",
        arxiv="2506.10967",
        code="github.com/Theia-4869/CDPruner (Apache-2.0, not used)",
        signals="visual tokens, input embeddings of the instruction",
        cost="per kept token one product with the visual tokens and one with the picks so far, O(N (D + keep)); keep x N floats of memory",
        needs_text=True,
        settings={
            "relevance": "similarity: cosine to the mean input embedding of the instruction; clip: cosine of CLIP's embeddings, as published",
            "text_tower": "hub id or folder of the CLIP checkpoint that the vision tower comes from, for relevance='clip'",
            "sign": "1: similar to the question is relevant; -1: the reverse; None: 1 for similarity, -1 for clip, as the authors do",
            "theta": "balance in [0, 1) of the paper's appendix: quality becomes exp(theta / (2 (1 - theta)) quality); None: off, as published",
            "compat": "authors: for the replay of vectors only; on a model the authors' choice is relevance='clip'",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"cdpruner: theta must be in [0, 1), got {self.theta}; None switches it off")

    def choose(self, tokens: Tensor, quality: Tensor, real: Tensor, keep: Tensor, most: int) -> Tensor:
        return cdpruner(tokens, balanced(quality, self.theta), real, keep, most)
