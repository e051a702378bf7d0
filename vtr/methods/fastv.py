"""FastV: drop visual tokens once, early in the LLM, by the attention they get from the last token.

Paper: Chen et al., ECCV 2024, arXiv 2403.06764, Section 4.
Code:  github.com/pkunlp-icler/FastV at d165972 (no licence): nothing copied, checked against its outputs.
Stage: prefill. Reads: one attention row of layer K - 1. Batch: any. Deterministic: yes.

1. Layers 0 .. K - 1 see all visual tokens.
2. The score of a visual token is the attention that the last prompt token pays to it in layer K - 1, averaged over the heads.
3. The best-scored tokens stay, in their order and at their positions; the others are gone from the input of layer K on.
4. It happens once, at prefill: the KV cache of layers K and later holds the survivors only.

Paper to code: K -> layer, R -> 1 - keep_ratio.
Departures: newline and padding tokens inside the image are not ranked; the released tables come from a fork that chose again at every
decoding step, the default here is the authors' later fork that chooses once and keeps the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.methods._score import ScoreMethod
from vtr.registry import register_method
from vtr.types import Budget, Card, Geometry, Layer, Signal, Stage, View, at_least
from vtr.types.signals import LAST, attention


def fastv_score(attention: Tensor) -> Tensor:
    """Returns the score `(..., N)` of attention of the last token to the visual tokens, `(..., H, N)` after the softmax over all keys."""
    return attention.float().mean(-2)


@register_method("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(ScoreMethod):
    """The default is the paper's headline setting, K = 2 and R = 50 %."""

    layer: int = 2

    symbol: ClassVar[str] = "K"
    stages: ClassVar[tuple[Stage, ...]] = ("prefill",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.5)
    card: ClassVar[Card] = Card(
        title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
        paper="Chen et al., 2024",
        venue="ECCV 2024",
        arxiv="2403.06764",
        code="github.com/pkunlp-icler/FastV (no licence, not used)",
        signals="attention row of the last token, layer - 1",
        cost="one query row of one layer, O(H L d); layers before `layer` run in full",
        settings={"layer": "visual tokens are gone from the input of this layer on; the paper's K, the number of full layers"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            "layer",
            1,
            f" (the paper's K = {self.layer}): scores come from the layer before; to remove tokens before the LLM use a boundary method such as "
            "'divprune'",
        )

    def where(self, geometry: Geometry) -> Layer:
        return Layer(self.layer)

    def needs(self, geometry: Geometry) -> Signal:
        return attention(self.layer - 1, queries=LAST)

    def score(self, view: View, row: Tensor) -> Tensor:
        return row  # the mean over heads
