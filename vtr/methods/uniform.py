"""Uniform: keep every n-th visual token.

Paper: none; ours.
Stage: boundary. Reads: nothing. Batch: any. Deterministic: yes.

1. An image's N visual tokens are taken in order: thumbnail first, then the canvas of crops, each in raster order.
2. Those at floor((i + 1/2) N / K), i = 0 .. K - 1, stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtr.ops.spaced import evenly_spaced
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, Geometry, Method, Remove, Selection, Stage, Step, View


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
        cost="O(N), no arithmetic on tokens",
        ours=True,
    )

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Remove(Boundary(), _select),)


def _select(view: View) -> Selection:
    return Selection(keep=evenly_spaced(view.real, view.keep))
