"""Small models of SmolVLM and Idefics 3, which join the patches of tiles and fill up with tiles of zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.testing.families import IMAGE, LLM, PIXELS, TOWER, Visual
from vtr.testing.joined import JOINS, Joined

QUARTER = 4


class SmolVLM(Joined):
    """SmolVLM and Idefics 3: tiles of 8 x 8 patches, 2 x 2 to a token, each tile between text of its own; zeros fill up to four tiles."""

    has_cls = False
    side_tokens = QUARTER

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        import transformers

        name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[self.model_type]
        text = transformers.LlamaConfig(**{**LLM, **changes.pop("text", {})})
        vision = {**TOWER, "patch_size": PIXELS // (2 * QUARTER), **changes.pop("tower", {})}
        settings = dict(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0, **changes)
        return getattr(transformers, f"{name}ForConditionalGeneration"), getattr(transformers, f"{name}Config")(**settings)

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        return [(QUARTER, QUARTER)] * max(shot.height // PIXELS, 1) * max(shot.width // PIXELS, 1)

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        pixels = torch.zeros(1, JOINS, 3, PIXELS, PIXELS)
        views = len(self.grids(shot))
        pixels[0, :views] = torch.randn(views, 3, PIXELS, PIXELS, generator=random)
        return pixels

    def language(self, model: Any) -> Any:
        return model.model.text_model

    def tower_layers(self, model: Any) -> Any:
        return model.model.vision_model.encoder.layers

    def projected(self, model: Any, features: Tensor) -> Tensor:
        return model.model.connector.modality_projection(features)
