"""What CDPruner and Script share: how relevant a token is to the question, and a choice of its own in every view. Not a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.dpp import min_max
from vtr.ops.relevance import clip_relevance, text_similarity
from vtr.ops.split import gather_parts, join_mask, split
from vtr.types import Boundary, Geometry, Method, Observe, PositionOption, Remove, Selection, Signal, Step, View, VtrError
from vtr.types.signals import text_embedding

FEATURES = "features"  # of the tower, per token


@dataclass(frozen=True, kw_only=True)
class Relevant(Method):
    """Relevance by the LLM's input embeddings or by a CLIP text tower, scaled to 0 .. 1 over the image."""

    relevance: Literal["similarity", "clip"] = "similarity"
    text_tower: str | None = None
    sign: Literal[1, -1] | None = None
    compat: Literal["authors"] | None = None

    published_positions: ClassVar[PositionOption] = "renumber"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance not in ("similarity", "clip"):
            raise ValueError(f"{self.name}: relevance must be 'similarity' or 'clip', got {self.relevance!r}")
        if (self.relevance == "clip") != (self.text_tower is not None):
            raise ValueError(
                f"{self.name}: relevance='clip' and text_tower= go together, got relevance={self.relevance!r} and "
                f"text_tower={self.text_tower!r}; give the CLIP checkpoint of the model's vision tower, e.g. openai/clip-vit-large-patch14-336"
            )
        if self.sign not in (1, -1, None):
            raise ValueError(f"{self.name}: sign must be 1 or -1, got {self.sign!r}; None chooses by relevance")

    def choose(self, tokens: Tensor, quality: Tensor, real: Tensor, keep: Tensor, most: int) -> Tensor:
        """Keep mask `(G, N)` of the tokens `(G, N, D)` of one view each, by their quality `(G, N)`, above 0."""
        raise NotImplementedError

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat == "authors":
            raise VtrError(
                f"{self.name}: compat='authors' is for the replay of vectors; relevance='clip' is the authors' choice on a model"
            )
        if self.text_tower is None:
            return (Remove(Boundary(), lambda view: self._select(view, self._similarity(view))),)
        question = text_embedding(self.text_tower)
        return (
            Observe(Boundary(before_projector=True), _note_features),
            Remove(Boundary(), lambda view: self._select(view, self._clip(view, question)), (question,)),
        )

    def _similarity(self, view: View) -> Tensor:
        assert view.text is not None
        return (self.sign or 1) * text_similarity(view.tokens, view.text.tokens, view.text.instruction)

    def _clip(self, view: View, question: Signal) -> Tensor:
        asked = view.signals[question]
        return -(self.sign or -1) * clip_relevance(asked.joint(view.per_token[FEATURES]), asked.text, asked.real)

    def _select(self, view: View, relevance: Tensor) -> Selection:
        quality = min_max(relevance, view.real)
        if view.views == 1:
            return Selection(keep=self.choose(view.tokens, quality, view.real, view.keep, view.most))
        area = max(rows * cols for grids in view.grids for rows, cols in grids)
        parts = split(view.cells[..., 0], view.real, view.keep, view.views, min(area, view.real.shape[1]))
        tokens, weights = gather_parts(view.tokens, parts), gather_parts(quality, parts)
        kept = self.choose(tokens, weights, parts.real.flatten(0, 1), parts.keep.flatten(), min(_most_of_a_view(view), tokens.shape[1]))
        return Selection(keep=join_mask(kept, parts, view.real.shape[1]))


def _most_of_a_view(view: View) -> int:
    """The most tokens that one view can have to leave: an equal share of its image, all of it where another view may have fewer than that."""
    most = 0
    for grids, count, keep in zip(view.grids, view.counts, view.keeps, strict=True):
        share, area = -(-keep // len(grids)), max(rows * cols for rows, cols in grids)
        fewest = count - (len(grids) - 1) * area  # that a view can have while the others are whole
        most = max(most, share if fewest >= share else keep)
    return most


def _note_features(view: View) -> None:
    view.per_token[FEATURES] = torch.where(view.real[..., None], view.tokens, 0)
