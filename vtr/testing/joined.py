"""Small models of families that join patches behind a tower of one grid: InternVL, SmolVLM and Idefics 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.testing.families import IMAGE, LLM, PIXELS, SIDE, TOWER, Family, Shot, own_key_seen

JOINS, HALF, QUARTER = 4, SIDE // 2, 4


def blocks_of_four(half: int = HALF) -> Tensor:
    """Returns the patches of every token `(half ** 2, 4)`: a block of 2 x 2, tokens in raster order."""
    return torch.arange(4 * half * half).view(half, 2, half, 2).permute(0, 2, 1, 3).reshape(-1, JOINS)


class InternVL(Family):
    """InternVL: tiles of 6 x 6 patches with a CLS token, 2 x 2 patches to a token; up to four tiles of an image side by side."""

    scaled = True

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

        vision = {**TOWER, "image_size": [PIXELS, PIXELS], "patch_size": [PIXELS // SIDE] * 2, **changes.pop("tower", {})}
        text = Qwen2Config(**{**LLM, **changes.pop("text", {})})
        config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_ratio=0.5, **changes)
        return InternVLForConditionalGeneration, config

    def grids(self, shot: Shot) -> list[tuple[int, int]]:
        return [(HALF, HALF)] * max(shot.height // PIXELS, 1) * max(shot.width // PIXELS, 1)

    def around(self) -> tuple[list[int], list[int]]:
        return [91], [92]

    def pixels(self, shot: Shot, random: torch.Generator) -> Tensor:
        return torch.randn(len(self.grids(shot)), 3, PIXELS, PIXELS, generator=random)

    def tower_layers(self, model: Any) -> Any:
        return model.model.vision_tower.encoder.layer

    def before_mlp(self, layer: Any) -> Any:
        return layer.layernorm_after

    def units(self, hidden: Tensor, shots: list[Shot]) -> Tensor:
        return hidden[:, 1:][:, blocks_of_four().flatten()].reshape(len(hidden), HALF * HALF, -1)

    def with_units(self, hidden: Tensor, units: Tensor, shots: list[Shot]) -> Tensor:
        patches = units.reshape(len(hidden), SIDE * SIDE, -1)[:, blocks_of_four().flatten().argsort()]
        return torch.cat([hidden[:, :1], patches], 1)

    def tower_masks(self, model: Any, layer: int, shots: list[Shot], bias: Tensor) -> list[Tensor]:
        patches = bias.repeat_interleave(JOINS, 1)[:, blocks_of_four().flatten().argsort()]
        return [own_key_seen(torch.nn.functional.pad(patches, (1, 0)))]


class SmolVLM(Family):
    """SmolVLM and Idefics 3: tiles of 8 x 8 patches, 2 x 2 to a token, each tile between text of its own; zeros fill up to four tiles."""

    has_cls = False

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        import transformers

        name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[self.model_type]
        text = transformers.LlamaConfig(**{**LLM, **changes.pop("text", {})})
        vision = {**TOWER, "patch_size": PIXELS // (2 * QUARTER), **changes.pop("tower", {})}
        settings = dict(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0, **changes)
        return getattr(transformers, f"{name}ForConditionalGeneration"), getattr(transformers, f"{name}Config")(**settings)

    def grids(self, shot: Shot) -> list[tuple[int, int]]:
        return [(QUARTER, QUARTER)] * max(shot.height // PIXELS, 1) * max(shot.width // PIXELS, 1)

    def around(self) -> tuple[list[int], list[int]]:
        return [91], [92]

    def pixels(self, shot: Shot, random: torch.Generator) -> Tensor:
        pixels = torch.zeros(1, JOINS, 3, PIXELS, PIXELS)
        views = len(self.grids(shot))
        pixels[0, :views] = torch.randn(views, 3, PIXELS, PIXELS, generator=random)
        return pixels

    def language(self, model: Any) -> Any:
        return model.model.text_model

    def tower_layers(self, model: Any) -> Any:
        return model.model.vision_model.encoder.layers

    def units(self, hidden: Tensor, shots: list[Shot]) -> Tensor:
        return hidden[:, blocks_of_four(QUARTER).flatten()].reshape(len(hidden), QUARTER * QUARTER, -1)

    def with_units(self, hidden: Tensor, units: Tensor, shots: list[Shot]) -> Tensor:
        return units.reshape(hidden.shape)[:, blocks_of_four(QUARTER).flatten().argsort()]

    def tower_masks(self, model: Any, layer: int, shots: list[Shot], bias: Tensor) -> list[Tensor]:
        return [own_key_seen(bias.repeat_interleave(JOINS, 1)[:, blocks_of_four(QUARTER).flatten().argsort()])]

    def projected(self, model: Any, features: Tensor) -> Tensor:
        return model.model.connector.modality_projection(features)
