"""Small models of families that join patches behind a tower of one grid: InternVL and Gemma 3."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.testing.families import IMAGE, LLM, PIXELS, SIDE, TOWER, Family, Shot, own_key_seen

JOINS, HALF = 4, SIDE // 2


def blocks_of_four(half: int = HALF) -> Tensor:
    """Returns the patches of every token `(half ** 2, 4)`: a block of 2 x 2, tokens in raster order."""
    return torch.arange(4 * half * half).view(half, 2, half, 2).permute(0, 2, 1, 3).reshape(-1, JOINS)


class InternVL(Family):
    """InternVL: tiles of 6 x 6 patches with a CLS token, 2 x 2 patches to a token; up to four tiles of an image side by side."""

    refused: ClassVar[dict[str, str]] = {"O9b": "scale"}

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


class Gemma3(Family):
    """Gemma 3: one view of 6 x 6 patches averaged to 3 x 3 tokens, which see each other; a window of 12 in three of five layers."""

    has_cls = False
    types = "token_type_ids"
    counts_text = False
    refused: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("O3d", "O4b", "O6b"), "renumber"),
        **dict.fromkeys(("O8", "O8b"), "freezes"),
        "O7": "static cache",
        "O10": "takes no mask",
        "O12": "later turn",
    }
    generation: ClassVar[dict[str, Any]] = {"suppress_tokens": [0, 91, 92, IMAGE]}

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        slides, full = "sliding_attention", "full_attention"
        rope = {full: {"rope_type": "default", "rope_theta": 1e5}, slides: {"rope_type": "default", "rope_theta": 1e4}}
        kinds = [slides, slides, full, slides, full]
        text = {**LLM, "head_dim": 16, "sliding_window": 12, "layer_types": kinds, "rope_parameters": rope, "query_pre_attn_scalar": 16}
        text |= changes.pop("text", {})
        vision = {**TOWER, "vision_use_head": False, **changes.pop("tower", {})}
        ids = dict(image_token_id=IMAGE, image_token_index=IMAGE, boi_token_index=91, eoi_token_index=92)
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=HALF * HALF, **ids, **changes)
        return Gemma3ForConditionalGeneration, config

    def grids(self, shot: Shot) -> list[tuple[int, int]]:
        return [(HALF, HALF)]

    def around(self) -> tuple[list[int], list[int]]:
        return [91], [92]

    def together(self, visual: Tensor) -> Tensor:
        run = torch.where(visual, (visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]).cumsum(1), 0)
        return (run[:, :, None] == run[:, None]) & visual[:, None]

    def tower_layers(self, model: Any) -> Any:
        return getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).encoder.layers

    def projected(self, model: Any, features: Tensor) -> Tensor:
        projector, mean = model.model.multi_modal_projector, features.unflatten(-1, (JOINS, -1)).mean(-2)
        return projector.mm_soft_emb_norm(mean) @ projector.mm_input_projection_weight

    def units(self, hidden: Tensor, shots: list[Shot]) -> Tensor:
        return hidden[:, blocks_of_four().flatten()].reshape(len(hidden), HALF * HALF, -1)

    def with_units(self, hidden: Tensor, units: Tensor, shots: list[Shot]) -> Tensor:
        return units.reshape(hidden.shape)[:, blocks_of_four().flatten().argsort()]

    def tower_masks(self, model: Any, layer: int, shots: list[Shot], bias: Tensor) -> list[Tensor]:
        return [own_key_seen(bias.repeat_interleave(JOINS, 1)[:, blocks_of_four().flatten().argsort()])]
