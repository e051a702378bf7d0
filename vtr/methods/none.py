"""None: no visual token at all. What the LLM answers from the question alone.

Paper: none; ours.
Stage: boundary. Reads: nothing. Batch: any. Deterministic: yes.

1. Every visual token and every newline token is removed before the LLM.
2. Positions are renumbered, so that the result is that of the same prompt with its image cut out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtr.registry import register_method
from vtr.types import Boundary, Card, Geometry, Method, NewlineOption, PositionOption, Remove, Selection, Stage, Step, View


@register_method("none")
@dataclass(frozen=True, kw_only=True)
class Nothing(Method):
    """Removes all visual tokens; has no budget."""

    newlines: NewlineOption = "none"

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    published_positions: ClassVar[PositionOption] = "renumber"
    removes_all: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        title="None: the prompt with its image cut out",
        paper="none (reference row)",
        signals="nothing",
        cost="none",
        ours=True,
    )

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Remove(Boundary(), _select, counted=False),)

    @classmethod
    def identity(cls, n: int) -> Method:
        """Equals the prompt without its image, whatever `n` is."""
        return cls()


def _select(view: View) -> Selection:
    return Selection(keep=torch.zeros_like(view.real))
