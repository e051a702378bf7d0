"""Small models with a Pixtral tower: Mistral 3, and LLaVA around it; images of any grid, rows closed by break tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.testing.families import IMAGE, LLM, TOWER, Family, Shot

BREAK, END, PATCH, MOST = 93, 92, 8, 96


class Pixtral(Family):
    """A Pixtral tower whose patches are joined `side` x `side`: Mistral 3 with 2, LLaVA with 1."""

    has_cls = False
    refused: ClassVar[dict[str, str]] = dict.fromkeys(("O9", "O9b"), "vision tower")

    def __init__(self, side: int) -> None:
        self.side = side

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import (
            LlavaConfig,
            LlavaForConditionalGeneration,
            Mistral3Config,
            Mistral3ForConditionalGeneration,
            MistralConfig,
            PixtralVisionConfig,
        )

        settings = dict(
            vision_config=PixtralVisionConfig(**{**TOWER, "image_size": MOST, **changes.pop("tower", {})}),
            text_config=MistralConfig(**{**LLM, "sliding_window": None, **changes.pop("text", {})}),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
        if self.side == 1:
            return LlavaForConditionalGeneration, LlavaConfig(**{**settings, "vision_feature_select_strategy": "full", **changes})
        return Mistral3ForConditionalGeneration, Mistral3Config(**settings, spatial_merge_size=self.side, **changes)

    def grids(self, shot: Shot) -> list[tuple[int, int]]:
        unit = 2 * PATCH  # also without joining, so that images stay small
        return [(max(shot.height // unit, 1) * 2 // self.side, max(shot.width // unit, 1) * 2 // self.side)]

    def placeholders(self, shot: Shot, count: int) -> list[int]:
        rows, cols = self.grids(shot)[0]
        return [*(([IMAGE] * cols + [BREAK]) * rows)[:-1], END]

    def pixels(self, shot: Shot, random: torch.Generator) -> Tensor:
        return torch.randn(1, 3, MOST, MOST, generator=random)

    def beside(self, shots: list[Shot]) -> dict[str, Tensor]:
        unit = PATCH * self.side
        return {"image_sizes": torch.tensor([[rows * unit, cols * unit] for shot in shots for rows, cols in self.grids(shot)])}

    def tower_layers(self, model: Any) -> Any:
        return model.model.vision_tower.transformer.layers
