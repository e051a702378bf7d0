"""PyramidDrop: drop visual tokens in three stages inside the LLM, by the attention of the last token.

Paper: Xing et al., CVPR 2025, arXiv 2410.17247, Section 3.
Code:  github.com/Cooperx521/PyramidDrop at 6444f30, MIT: nothing copied, checked against its outputs.
Stage: prefill. Reads: queries and keys of the step's own layer. Batch: any. Deterministic: yes.

1. At layer r, its norm and projections give queries and keys of the tokens that enter it, rotary embedding included.
2. The score of a visual token is the softmax attention, over the whole prompt, that the last token's query pays to it, mean over the heads.
3. The best-scored tokens stay, in their order; the others are gone from the input of layer r on.
4. It happens at layers 8, 16 and 24 of 32, which leave 1/2, 1/4 and 1/8 of the original tokens.
5. Positions are renumbered at every stage; the KV cache of a segment holds what the segment saw.

Paper to code: layer_list -> layers, image_token_ratio_list -> shares of the way from keep to N, lambda -> 1/2.
Departures: exact counts for every budget, where the code cuts `N ratio` down; newline tokens are neither ranked nor in the softmax; any number
of images; the last token is the last text token. An `average_keep` below the reach of layers 8/16/24 gets one of three schedules of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.methods._schedule import Scheduled
from vtr.ops.prompt_rows import last_token_row
from vtr.ops.schedule import least_average, scaled_layers
from vtr.ops.topk import Known, topk_mask
from vtr.registry import register_method
from vtr.types import Budget, Card, Geometry, Layer, PerToken, PositionOption, Remove, Selection, Stage, Step, View
from vtr.types.signals import next_keys, next_queries

PUBLISHED = (8, 16, 24)
RATIOS = (0.5, 0.25, 0.125)
OURS = ((4, 8, 16), (3, 6, 9), (2, 3, 4))
"""For averages of about 192, 128 and 64 of 576, which the published layers cannot reach; nobody else's numbers belong to them."""


def pyramiddrop_score(query: PerToken, key: PerToken, real: Tensor, text_real: Tensor, row: Tensor, scaling: float | None = None) -> Tensor:
    """Attention of the last token of each prompt to its visual tokens.

    Args:
        query, key: `visual (G, N, H, d)` and `text (G, M, H, d)` after the rotary embedding; keys may have fewer heads.
        real: `(G, N)` bool.
        text_real: `(G, M)` bool, text in position order.
        row: `(G,)` int64, prompt of each group.
        scaling: factor on the logits, the model's own; None = `d ** -0.5`.

    Returns:
        `(G, N)`, mean over heads of the softmax over all text and visual tokens of the prompt, float32 at least.
    """
    return last_token_row(query.visual, query.text, key.visual, key.text, real, text_real, row, scaling=scaling)


def pyramiddrop(score: Tensor, real: Tensor, keep: Tensor, known: Known | None = None) -> Tensor:
    """Keep mask `(G, N)` of the `keep (G,)` best-scored among `real (G, N)`; ties go to the lowest index. `known` as for `topk_mask`."""
    return topk_mask(score, real, keep, known)


@register_method("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Scheduled):
    """Three drops at a quarter, a half and three quarters of the depth; the default budget is the paper's last ratio, 1/8."""

    stages: ClassVar[tuple[Stage, ...]] = ("prefill",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=RATIOS[-1])
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        paper="Xing et al., 2025",
        venue="CVPR 2025",
        arxiv="2410.17247",
        code="github.com/Cooperx521/PyramidDrop (MIT, not used)",
        signals="queries and keys of the layers that drop, computed once more",
        cost="norm and projections of three layers a second time and one attention row each; the layers before the first drop run in full",
        needs_text=True,
        settings={
            "layers": "the three layers from whose input on tokens are gone; None: 8, 16, 24 of 32 at the same relative depth, earlier ones "
            "(ours) where average_keep asks for less than these can reach",
            "counts": "keep counts after each drop, of an image with the most tokens of the model; instead of a budget",
        },
    )

    def schedule(self, geometry: Geometry) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Layers, and the share of the way from keep to N that each drop leaves."""
        shares = self.shares(geometry, RATIOS)
        if self.layers is not None:
            return self.layers, shares
        try:
            choices = [scaled_layers(layers, geometry.llm_layers) for layers in (PUBLISHED, *OURS)]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; use 'fastv', which removes once") from error
        if self.average_keep is None:
            return choices[0], shares
        wanted = self.average_keep / self.most_tokens(geometry)
        reach = [layers for layers in choices if least_average(layers, shares, geometry.llm_layers) <= 0.95 * wanted]
        return (reach or choices[-1:])[0], shares

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        layers, shares = self.schedule(geometry)
        needs = (next_queries(), next_keys())

        def select(view: View) -> Selection:
            assert view.text is not None
            query, key = (view.signals[need] for need in needs)
            score = pyramiddrop_score(query, key, view.real, view.text.real, view.row, view.scaling.get(needs[0]))
            return Selection(keep=pyramiddrop(score, view.real, view.keep, (view.counts, view.keeps)))

        return tuple(Remove(Layer(layer), select, needs, share=share) for layer, share in zip(layers, shares, strict=True))
