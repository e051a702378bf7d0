"""Script: leave out the visual tokens most redundant in a similarity graph, then keep different ones that fit the question.

Paper: Yang et al., TMLR 2025, arXiv 2512.01949.
Code:  github.com/01yzzyu/script.github.io at 7e5e2f3, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary. Reads: visual tokens behind the projector, input embeddings of the instruction. Batch: any. Deterministic: yes.

**The default is ours**: a working intersection of the paper's two modules. In the released code the graph module has no effect, its score has the
wrong direction, and its determinantal point process is none; which code made the published tables cannot be established.

1. Graph module: the redundancy of a token comes from the number and the mean similarity of the tokens that are similar to it (cosine >= tau).
2. Of the tokens that are too many, the share `redundant` goes: the most redundant.
3. Query module: among the rest, greedy MAP of a determinantal point process with the kernel relevance x cosine x relevance.
4. Relevance is the cosine to the mean input embedding of the instruction, scaled to 0 .. 1 over the image.
5. Every view of an AnyRes image is treated alike, with an equal share of the budget.

Paper to code: tau -> tau, K -> least, gamma -> gamma, "released" -> `scripts/replay/script.py`.
Departure: all of the above; the released selection is in `scripts/replay/script.py` only. `relevance="clip"` has CLIP's
text tower as CDPruner has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods._relevance import Relevant
from vtr.ops.dpp import greedy_dpp
from vtr.ops.gather import index_to_mask
from vtr.ops.redundancy import graph_redundancy
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import Budget, Card, FrameOption, Stage


def script(
    tokens: Tensor, quality: Tensor, real: Tensor, keep: Tensor, most: int, redundant: float = 0.5, tau: float = 0.2, gamma: float = 1.0
) -> Tensor:
    """Steps 1 to 3 (ours).

    Args:
        tokens: `(G, N, D)`, any float dtype; computed in float32 at least.
        quality: `(G, N)`, above 0.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, at most `real.sum(1)`.
        most: `keep.max()` or more, as a Python int.
        redundant: share of the tokens above the budget that the graph module takes out, in [0, 1].
        tau, gamma: of the graph.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row. Ties: lowest index.
    """
    surplus = real.sum(1) - keep
    score, _ = graph_redundancy(tokens, real, tau, gamma=gamma)
    left = topk_mask(-score, real, keep + surplus - (surplus.double() * redundant).long())
    order = greedy_dpp(tokens, quality, left, most)
    return index_to_mask(order, torch.arange(most, device=order.device) < keep[:, None], tokens.shape[1])


@register_method("script")
@dataclass(frozen=True, kw_only=True)
class Script(Relevant):
    """A working intersection of the paper's two modules, ours; the default budget is the paper's 64 of 576."""

    redundant: float = 0.5
    tau: float = 0.2
    gamma: float = 1.0

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 9)
    card: ClassVar[Card] = Card(
        title="Script: Graph-Structured and Query-Conditioned Semantic Token Pruning (default: a repaired combination of ours)",
        paper="Yang et al., 2025; combination ours",
        venue="TMLR 2025",
        arxiv="2512.01949",
        code="github.com/01yzzyu/script.github.io (Apache-2.0, not used)",
        signals="visual tokens, input embeddings of the instruction",
        cost="N x N similarities once per view; per kept token one product with the visual tokens and one with the picks so far",
        needs_text=True,
        ours=True,
        settings={
            "relevance": "similarity: cosine to the mean input embedding of the instruction; clip: cosine of CLIP's embeddings, as published",
            "text_tower": "hub id or folder of the CLIP checkpoint that the vision tower comes from, for relevance='clip'",
            "sign": "1: similar to the question is relevant; -1: the reverse; None: 1 for similarity, -1 for clip, as the authors do",
            "redundant": "share of the tokens above the budget that the graph module takes out; 0: query module alone, 1: graph module alone",
            "tau": "cosine from which on two tokens are neighbours",
            "gamma": "weight of the neighbours' mean similarity",
            "compat": "authors: for the replay of vectors only",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.redundant <= 1:
            raise ValueError(f"script: redundant must be in [0, 1], got {self.redundant}; 0.5 takes half of the surplus")
        if not -1 <= self.tau <= 1:
            raise ValueError(f"script: tau must be a cosine, -1 to 1, got {self.tau}; the paper uses 0.2")

    def choose(self, tokens: Tensor, quality: Tensor, real: Tensor, keep: Tensor, most: int) -> Tensor:
        return script(tokens, quality, real, keep, most, self.redundant, self.tau, self.gamma)
