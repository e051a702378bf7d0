"""FasterVLM: keep the visual tokens that the CLS token attends to.

Paper: Zhang et al., arXiv 2412.01818 v1, "[CLS] Attention is All You Need for Training-Free Visual Token Pruning".
Code:  github.com/Theia-4869/FasterVLM at f5d5f12, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary, before the projector. Reads: the CLS row of the feature layer. Batch: any. Deterministic: yes.

1. The score of a token is the attention that CLS pays to it in the tower layer whose output is used, after the softmax, mean over heads.
2. The best T tokens stay, in their order. The CLS token is not kept. Every view of an AnyRes image keeps the same share.

Paper to code: T -> keep, R -> 1 - keep_ratio.
Departures: the padding of AnyRes images is no candidate and newline tokens stay, where the code leaves out unpadding and newlines;
tokens are chosen before the projector, which is the same and cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtr.methods._score import ScoreMethod
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, FrameOption, Geometry, PositionOption, Signal, Stage, View
from vtr.types.signals import cls_row


def fastervlm_score(attention: Tensor) -> Tensor:
    """Returns the score `(..., N)` of CLS attention `(..., H, N)` after the softmax over CLS and patches."""
    return attention.float().mean(-2)


@register_method("fastervlm")
@dataclass(frozen=True, kw_only=True)
class FasterVLM(ScoreMethod):
    """The default budget is a quarter, the 144 of 576 of the paper; positions are renumbered as the authors do."""

    per: ClassVar[Literal["image", "view"]] = "view"
    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.25)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
        paper="Zhang et al., 2024",
        venue="preprint",
        arxiv="2412.01818",
        code="github.com/Theia-4869/FasterVLM",
        signals="CLS attention of the feature layer",
        cost="one q_cls K product of one tower layer, one sort of N",
        needs_cls=True,
    )

    def where(self, geometry: Geometry) -> Boundary:
        return Boundary(before_projector=True)

    def needs(self, geometry: Geometry) -> Signal:
        return cls_row(geometry.feature_layer)

    def score(self, view: View, row: Tensor) -> Tensor:
        return row  # the mean over heads
