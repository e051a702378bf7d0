"""Features that a model adds to its visual tokens behind its first LLM layers (DeepStack), added by us once tokens are removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtr.engine.tokens import Places


@dataclass
class Beside:
    """Features of the visual tokens of a call.

    Args:
        row: `(B, q)` int64 over original columns, row of each visual token in the features, -1 for anything else.
        features: behind each of the first LLM layers, `(visual tokens of the batch, D)`.
    """

    row: Tensor
    features: list[Tensor]

    @classmethod
    def of(cls, visual: Tensor, features: list[Tensor]) -> Beside:
        """Returns the features of the visual tokens `visual (B, q)` bool, numbered row by row as the model numbers them."""
        number = (visual.flatten().cumsum(0) - 1).view_as(visual)
        return cls(torch.where(visual, number, -1), list(features))

    def added(self, layer: int, hidden: Tensor, places: Places) -> Tensor:
        """Returns what enters LLM layer `layer`, with the features behind the layer before it: hidden states `(B, S, D)` of the tokens left."""
        if not 0 < layer <= len(self.features):
            return hidden
        row = torch.where(places.valid, self.row.to(hidden.device).gather(1, places.column), -1)
        features = self.features[layer - 1].to(hidden)
        return torch.where((row >= 0)[..., None], hidden + features[row.clamp_min(0)], hidden)
