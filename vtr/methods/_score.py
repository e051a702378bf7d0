"""What methods share that only rank the visual tokens at one place and keep the best. Not a method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from vtr.ops.topk import topk_mask
from vtr.types import Geometry, Layer, Method, Place, Remove, Selection, Signal, Step, View, check_llm_layer


@dataclass(frozen=True, kw_only=True)
class ScoreMethod(Method):
    """Base of methods that score visual tokens and keep the best `keep` of each image; ties go to the lowest index.

    A subclass says where, which signals it reads, and how tokens score.
    """

    per: ClassVar[Literal["image", "view"]] = "image"
    """`view`: every view of an image keeps the best of its share of the budget."""
    symbol: ClassVar[str] = ""
    """What the paper calls the LLM layer of `where`, for messages."""

    def where(self, geometry: Geometry) -> Place:
        """Returns the place where tokens are removed; an LLM layer is checked against the model."""
        raise NotImplementedError

    def needs(self, geometry: Geometry) -> Signal | tuple[Signal, ...]:
        """Returns the signals that `score` reads."""
        return ()

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the score `(G, N)` of each token, higher stays; written as `score(self, view, signal, ...)`, signals in the order of `needs`."""
        raise NotImplementedError

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        where, needs = self.where(geometry), self.needs(geometry)
        needs = needs if isinstance(needs, tuple) else (needs,)
        if isinstance(where, Layer):
            check_llm_layer(self.name, where.layer, geometry, int(bool(needs)), self.symbol)
        return (Remove(where, partial(self._keep_best, needs), needs, per=self.per),)

    def _keep_best(self, needs: tuple[Signal, ...], view: View) -> Selection:
        score = self.score(view, *(view.signals[need] for need in needs))
        return Selection(keep=topk_mask(score, view.real, view.keep, (view.counts, view.keeps)))
