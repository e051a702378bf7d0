"""Small models of families that join patches behind a tower of one grid: InternVL, Gemma 3 and Gemma 4."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from vtr.testing.families import IMAGE, LLM, PIXELS, SIDE, TOWER, Family, Visual, own_key_seen

JOINS, HALF = 4, SIDE // 2


def blocks_of_four(half: int = HALF) -> Tensor:
    """Returns the patches of every token `(half ** 2, 4)`: a block of 2 x 2, tokens in raster order."""
    return rearrange(torch.arange(JOINS * half * half), "(r i c j) -> (r c) (i j)", r=half, i=2, j=2)


class Joined(Family):
    """A family whose towers see views of patches, blocks of 2 x 2 of which become a token."""

    side_tokens: ClassVar[int] = HALF

    def around(self) -> tuple[list[int], list[int]]:
        return [91], [92]

    def units(self, hidden: Tensor, shots: list[Visual]) -> Tensor:
        order = blocks_of_four(self.side_tokens).flatten() + int(self.has_cls)
        return hidden[:, order].reshape(len(hidden), self.side_tokens**2, -1)

    def with_units(self, hidden: Tensor, units: Tensor, shots: list[Visual]) -> Tensor:
        back = blocks_of_four(self.side_tokens).flatten().argsort()
        patches = units.reshape(len(hidden), len(back), -1)[:, back]
        return torch.cat([hidden[:, : int(self.has_cls)], patches], 1)

    def tower_masks(self, model: Any, layer: int, shots: list[Visual], bias: Tensor) -> list[Tensor]:
        patches = bias.repeat_interleave(JOINS, 1)[:, blocks_of_four(self.side_tokens).flatten().argsort()]
        return [own_key_seen(torch.nn.functional.pad(patches, (int(self.has_cls), 0)))]


class InternVL(Joined):
    """InternVL: tiles of 6 x 6 patches with a CLS token, 2 x 2 patches to a token; up to four tiles of an image side by side."""

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

        vision = {**TOWER, "image_size": [PIXELS, PIXELS], "patch_size": [PIXELS // SIDE] * 2, **changes.pop("tower", {})}
        text = Qwen2Config(**{**LLM, **changes.pop("text", {})})
        config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_ratio=0.5, **changes)
        return InternVLForConditionalGeneration, config

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        return [(HALF, HALF)] * max(shot.height // PIXELS, 1) * max(shot.width // PIXELS, 1)

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        return torch.randn(len(self.grids(shot)), 3, PIXELS, PIXELS, generator=random)

    def tower_layers(self, model: Any) -> Any:
        return model.model.vision_tower.encoder.layer

    def before_mlp(self, layer: Any) -> Any:
        return layer.layernorm_after


class Gemma3(Joined):
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

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        return [(HALF, HALF)]

    def together(self, visual: Tensor, kind: str) -> Tensor | None:
        run = torch.where(visual, (visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]).cumsum(1), 0)
        return (run[:, :, None] == run[:, None]) & visual[:, None]

    def tower_layers(self, model: Any) -> Any:
        return getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).encoder.layers

    def projected(self, model: Any, features: Tensor) -> Tensor:
        projector, mean = model.model.multi_modal_projector, features.unflatten(-1, (JOINS, -1)).mean(-2)
        return projector.mm_soft_emb_norm(mean) @ projector.mm_input_projection_weight


class Gemma4(Gemma3):
    """Gemma 4: images of any grid, 2 x 2 patches averaged to a token; with a vision tower or without one, with embeddings for every layer or not."""

    types = "mm_token_type_ids"
    refused: ClassVar[dict[str, str]] = Gemma3.refused | dict.fromkeys(("O9", "O9b"), "tower")

    def __init__(self, small: bool = False, unified: bool = False) -> None:
        self.small, self.unified, self.whole_images = small, unified, unified  # type: ignore[misc]
        if small:
            by_layer = ("O1", "O2", "O4", "O5", "O6", "O7", "O7b", "O7c", "O12", "O12b", "O8", "O8b", "O10")
            self.refused = Gemma4.refused | dict.fromkeys(by_layer, "stage")  # type: ignore[misc]

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        import transformers

        name, slides, full = "Gemma4Unified" if self.unified else "Gemma4", "sliding_attention", "full_attention"
        rope = {full: {"rope_type": "default", "rope_theta": 1e5}, slides: {"rope_type": "default", "rope_theta": 1e4}}
        text: dict[str, Any] = {**LLM, "head_dim": 16, "sliding_window": 12, "attention_k_eq_v": True}
        text |= {"global_head_dim": 32, "num_global_key_value_heads": 1}  # of full layers
        text |= {"layer_types": [slides, slides, full, slides, full]}
        text |= {"rope_parameters": rope, "hidden_size_per_layer_input": 8 if self.small else 0, "vocab_size_per_layer_input": 120}
        text |= {"num_kv_shared_layers": 2 if self.small else 0, "use_bidirectional_attention": None if self.small else "vision"}
        text |= changes.pop("text", {})
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
        vision |= {"head_dim": 8, "patch_size": 8, "pooling_kernel_size": 2, "position_embedding_size": 64} | changes.pop("tower", {})
        if self.unified:
            vision = {
                "patch_size": 8,
                "model_patch_size": 16,
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
                "pooling_kernel_size": 2,
            }
        ids = dict(image_token_id=IMAGE, boi_token_id=91, eoi_token_id=92, video_token_id=101, audio_token_id=102)
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, audio_config=None, **ids, **changes)
        return getattr(transformers, f"{name}ForConditionalGeneration"), config

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        return [(max(shot.height // 16, 1), max(shot.width // 16, 1))]

    def together(self, visual: Tensor, kind: str) -> Tensor | None:
        plain = self.small or (kind == "full_attention" and not self.unified)
        return None if plain else super().together(visual, kind)

    def _patches(self, shot: Visual) -> tuple[int, int]:
        rows, cols = self.grids(shot)[0]
        return (rows, cols) if self.unified else (2 * rows, 2 * cols)

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        rows, cols = self._patches(shot)
        width, most = (768, 36) if self.unified else (192, 144)
        pixels = torch.zeros(1, most, width)
        pixels[0, : rows * cols] = torch.rand(rows * cols, width, generator=random)
        return pixels

    def beside(self, shots: list[Visual]) -> dict[str, Tensor]:
        places = torch.full((len(shots), 36 if self.unified else 144, 2), -1)
        for place, shot in zip(places, shots, strict=True):
            rows, cols = self._patches(shot)
            place[: rows * cols] = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).flip(1)
        return {"image_position_ids": places}
