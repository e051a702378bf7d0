"""Uniform: keep every n-th visual token.

Paper: none; ours.
Stage: boundary. Reads: nothing. Batch: any. Deterministic: yes.

1. An image's N visual tokens are taken in order: thumbnail first, then the canvas of crops, each in raster order.
2. Those at floor((i + 1/2) N / K), i = 0 .. K - 1, stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.ops.gather import index_to_mask, left_align
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, Geometry, Method, Remove, Selection, Stage, Step, View


def uniform(real: Tensor, keep: Tensor, most: int) -> Tensor:
    """Evenly spaced tokens.

    Args:
        real: `(G, N)` bool, True where a row has a token.
        keep: `(G,)` int64, at most `real.sum(1)`.
        most: `keep.max()` as a Python int.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row.
    """
    count, wanted = real.sum(1, keepdim=True), keep[:, None]
    i = torch.arange(most, device=real.device)[None]
    rank = ((2 * i + 1) * count).div(2 * wanted.clamp_min(1), rounding_mode="floor")  # (G, most), among the real ones
    position = left_align(real, real.shape[1])[0]
    return index_to_mask(position.gather(1, rank.clamp_max(real.shape[1] - 1)), i < wanted, real.shape[1])


@register_method("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """Every n-th token at the boundary; the default budget is a third, the 192 of 576 of most tables."""

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    card: ClassVar[Card] = Card(
        title="Uniform: every n-th visual token in raster order",
        paper="none (reference row)",
        signals="nothing",
        cost="O(N log N), no arithmetic on tokens",
        ours=True,
    )

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Remove(Boundary(), _select),)


def _select(view: View) -> Selection:
    return Selection(keep=uniform(view.real, view.keep, view.most))
