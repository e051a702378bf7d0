"""Random: keep visual tokens drawn at random. The row that every selection method has to beat.

Paper: none; ours.
Stage: boundary. Reads: nothing but patch ids. Batch: any. Deterministic: yes, by seed and image.

1. Every visual token gets a number from a hash of (seed, checksum of the image's pixel values, patch id).
2. The tokens with the smallest numbers stay.

The same image keeps the same tokens in every batch, on every row and on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.methods._score import ScoreMethod
from vtr.ops.hashing import random_key
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, Geometry, Stage, View


@register_method("random")
@dataclass(frozen=True, kw_only=True)
class Random(ScoreMethod):
    """Random choice at the boundary; the default budget is a third, the 192 of 576 of most tables."""

    seed: int = 0

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    card: ClassVar[Card] = Card(
        title="Random: visual tokens drawn at random",
        paper="none (reference row)",
        signals="nothing",
        cost="O(N log N), no arithmetic on tokens",
        ours=True,
        settings={"seed": "which draw; results of several seeds belong together in a table"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"random: seed must fit in 64 bits, got {self.seed}")

    def where(self, geometry: Geometry) -> Boundary:
        return Boundary()

    def score(self, view: View) -> Tensor:
        return -random_key(self.seed, view.checksum, view.patch).double()
