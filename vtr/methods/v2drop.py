"""V2Drop: drop the visual tokens that the LLM's layers change least, in three stages.

Paper: V2Drop, CVPR 2026, arXiv 2509.01552.
Code:  github.com/xuyang-liu16/V2Drop at 219e03e, Apache-2.0: nothing copied, checked against its outputs.
Stage: prefill. Reads: visual tokens in front of a layer and of the layer before. Batch: any. Deterministic: yes.

1. The variation of a visual token at layer l is the L2 norm of what layer l - 1 added to it.
2. The tokens with the largest variation stay, in their order and at their positions; the others are gone from the input of layer l on.
3. It happens at layers 3, 17 and 22 of 32, and one token is left in the end.

Paper to code: lazy tokens -> those with small variation, pruned shares 50/70/100, 72/75/100 and 95/95/100 % -> tables 192, 128 and 64.
Departures: every image ranks its own tokens (the code applies the ranking of the first prompt to the whole batch, at fixed places), padding
stays masked. The tables' names are averages over the layers, 193.8, 131.0 and 66.7 in truth. A `keep` above 1 is ours: the stages leave the
published shares of the way from it to N. The released file for LLaVA has .5/.5/0, which is no row of the paper: `counts=[288, 144, 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods._schedule import Tabled
from vtr.ops.blocks import CACHE, suits_cpu
from vtr.ops.precision import widened
from vtr.ops.topk import Known, topk_mask
from vtr.registry import register_method
from vtr.types import Budget, Card, Geometry, Layer, Observe, Remove, Selection, Stage, Step, View

N = 576
PUBLISHED = (3, 17, 22)
TABLES = {192: (288, 86, 1), 128: (161, 40, 1), 64: (28, 1, 1)}
"""Tokens after each stage: shares .5/.3/0, .28/.25/0 and .05/.05/0 of what is there, rounded down, at least 1."""
ENTERED = "entered"  # the layer before, per token
AT_ONCE = 128
"""Tokens whose changes a CPU holds at a time, in its cache."""


def variation(entered: Tensor, left: Tensor) -> Tensor:
    """L2 norm `(G, N)` of what a layer added to its input `entered (G, N, D)` to make `left`; float32 at least, without a gradient."""
    if not suits_cpu(left) or left.numel() * 4 <= CACHE:
        return torch.linalg.vector_norm(widened(left.detach()) - widened(entered.detach()), dim=-1)
    before, after = (widened(part.detach()).flatten(0, 1) for part in (entered, left))
    found, buffer = after.new_empty(len(after)), after.new_empty(min(AT_ONCE, len(after)), after.shape[1])
    for start in range(0, len(after), AT_ONCE):
        here = slice(start, start + AT_ONCE)
        change = torch.sub(after[here], before[here], out=buffer[: len(after[here])])
        torch.linalg.vector_norm(change, dim=-1, out=found[here])
    return found.view(left.shape[:2])


def v2drop(entered: Tensor, left: Tensor, real: Tensor, keep: Tensor, known: Known | None = None) -> Tensor:
    """Keep mask `(G, N)` of the `keep (G,)` tokens that changed most among `real (G, N)`; ties go to the lowest index."""
    return topk_mask(variation(entered, left), real, keep, known)


@register_method("v2drop")
@dataclass(frozen=True, kw_only=True)
class V2Drop(Tabled):
    """Variation-aware dropping; the default is the paper's 192-token schedule, which ends at one token."""

    tables, published, of = TABLES, PUBLISHED, N
    stages: ClassVar[tuple[Stage, ...]] = ("prefill",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=TABLES[192][-1] / N)
    card: ClassVar[Card] = Card(
        title="V2Drop: Variation-aware Vision Token Dropping",
        paper="V2Drop, 2025",
        venue="CVPR 2026",
        arxiv="2509.01552",
        code="github.com/xuyang-liu16/V2Drop (Apache-2.0, not used)",
        signals="visual tokens in front of three layers and of those before; no attention",
        cost="one norm of N x D per stage; visual tokens of one layer are held, and layers before the first drop run in full",
        settings={
            "table": "published schedule whose shape is used: 192, 128 or 64; None: the one nearest to the budget",
            "layers": "the three layers from whose input on tokens are gone; None: 3, 17, 22 of 32, same relative depth elsewhere",
            "counts": "tokens after each stage of an image with the most tokens of the model; instead of a budget",
        },
    )

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        layers, shares = self.schedule(geometry)
        steps: list[Step] = []
        for layer, share in zip(layers, shares, strict=True):
            steps += [Observe(Layer(layer - 1), _note), Remove(Layer(layer), _select, share=share)]
        return tuple(steps)


def _note(view: View) -> None:
    view.per_token[ENTERED] = view.tokens


def _select(view: View) -> Selection:
    keep = v2drop(view.per_token[ENTERED], view.tokens, view.real, view.keep, (view.counts, view.keeps))
    view.per_token[ENTERED] = view.tokens[..., :0]  # no longer needed
    return Selection(keep=keep)
