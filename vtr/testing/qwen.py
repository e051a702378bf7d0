"""Small models of Qwen-VL and GLM-4V: images of any grid, 2 x 2 patches to a token, one packed sequence in the tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.testing.families import IMAGE, LLM, TOWER_LAYERS, VIDEO, Clip, Family, Visual, own_key_seen

START, END, UNIT, JOINS = 91, 92, 16, 4
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL (windows of 2 x 2 tokens in two of four layers) and Qwen3-VL (features behind two LLM layers; dense and MoE)."""

    has_cls = False
    types = "mm_token_type_ids"
    counts_text = False
    refused: ClassVar[dict[str, str]] = dict.fromkeys(("O3d", "O4b", "O6b"), "renumber")
    generation: ClassVar[dict[str, Any]] = {"suppress_tokens": [0, START, END, IMAGE, VIDEO]}

    def __init__(
        self, model_type: str, side: int = 2, window: int = 2, full: tuple[int, ...] = (1, 3), deepstack: tuple[int, ...] = (0, 2)
    ) -> None:
        """Args: model type; patches along the side of a token; tokens along that of a window, tower layers without windows (Qwen2.5-VL); tower
        layers whose features the LLM gets (Qwen3-VL)."""
        self.model_type, self.side, self.window, self.full, self.deepstack = model_type, side, window, full, deepstack
        self.joins = side**2

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        import transformers

        name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}[self.model_type]
        rope, third = dict(ROPE), self.model_type.startswith("qwen3")
        vision: dict[str, Any] = dict(
            depth=TOWER_LAYERS, hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=4, patch_size=8
        )
        if self.model_type == "qwen2_vl":
            vision = dict(depth=TOWER_LAYERS, embed_dim=32, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=8)
        if self.model_type == "qwen2_5_vl":
            vision |= dict(window_size=8 * self.side * self.window, fullatt_block_indexes=list(self.full))
        if third:
            vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=list(self.deepstack))
        vision["spatial_merge_size"] = self.side
        text = {**LLM, "rope_parameters": rope | ({"mrope_interleaved": True} if third else {}), **({"head_dim": 16} if third else {})}
        if self.model_type == "qwen3_vl_moe":
            text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        text |= changes.pop("text", {})
        vision |= changes.pop("tower", {})
        ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids, **changes)
        return getattr(transformers, f"{name}ForConditionalGeneration"), config

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        frames = shot.frames if isinstance(shot, Clip) else 1
        return [(max(shot.height // UNIT, 1), max(shot.width // UNIT, 1))] * frames

    def around(self) -> tuple[list[int], list[int]]:
        return [START], [END]

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        return torch.randn(self._tokens(shot) * self.joins, 2 * 3 * 8 * 8, generator=random)

    def beside(self, shots: list[Visual]) -> dict[str, Tensor]:
        kind = "video" if isinstance(shots[0], Clip) else "image"
        grids = [self.grids(shot) for shot in shots]
        return {f"{kind}_grid_thw": torch.tensor([[len(own), self.side * own[0][0], self.side * own[0][1]] for own in grids])}

    def positions(self, model: Callable[[], Any], inputs: dict[str, Tensor]) -> Tensor:
        text = super().positions(model, inputs)
        names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
        given = {name: inputs[name] for name in names if name in inputs}
        if not any(name.endswith("thw") for name in given):
            return text.expand(4, -1, -1)
        rotary, _ = model().model.get_rope_index(**given)
        return torch.cat([text[None], rotary])

    def tower_layers(self, model: Any) -> Any:
        return model.model.visual.blocks

    def before_mlp(self, layer: Any) -> Any:
        return layer.norm2

    def projected(self, model: Any, features: Tensor) -> Tensor:
        return model.model.visual.merger(features.reshape(-1, features.shape[-1] // self.joins)).view(*features.shape[:-1], -1)

    def _tokens(self, shot: Visual) -> int:
        return sum(rows * cols for rows, cols in self.grids(shot))

    def _frames(self, shots: list[Visual]) -> list[Visual]:
        """Returns every frame of videos as a visual of its own."""
        return [Clip(shot.height, shot.width, 1) if isinstance(shot, Clip) else shot for shot in shots for _ in self.grids(shot)]

    def _windows(self, shot: Visual) -> list[Tensor]:
        """Returns the tokens of an image window by window, in raster order of windows; one window where the tower has none."""
        rows, cols = self.grids(shot)[0]
        tokens = torch.arange(rows * cols).view(rows, cols)
        if self.model_type != "qwen2_5_vl":
            return [tokens.flatten()]
        side = self.window
        return [tokens[r : r + side, c : c + side].flatten() for r in range(0, rows, side) for c in range(0, cols, side)]

    def units(self, hidden: Tensor, shots: list[Visual]) -> Tensor:
        shots = self._frames(shots)
        parts = hidden.reshape(-1, self.joins * hidden.shape[-1]).split([self._tokens(shot) for shot in shots])
        raster = [part[torch.cat(self._windows(shot)).argsort()] for part, shot in zip(parts, shots, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(raster, batch_first=True)

    def with_units(self, hidden: Tensor, units: Tensor, shots: list[Visual]) -> Tensor:
        shots = self._frames(shots)
        parts = [own[torch.cat(self._windows(shot))] for own, shot in zip(units, shots, strict=True)]
        return torch.cat(parts).reshape(hidden.shape)

    def tower_masks(self, model: Any, layer: int, shots: list[Visual], bias: Tensor) -> list[Tensor]:
        shots = self._frames(shots)
        whole = self.model_type != "qwen2_5_vl" or layer in model.config.vision_config.fullatt_block_indexes
        segments = []
        for own, shot in zip(bias, shots, strict=True):
            windows = self._windows(shot)
            segments += [own[w] for w in ([torch.cat(windows)] if whole else windows)]
        return [own_key_seen(segment.repeat_interleave(self.joins)[None]) for segment in segments]


class GlmV(QwenVL):
    """GLM-4V: a convolution joins 2 x 2 patches in front of the merger; norms behind attention and MLP of the LLM's layers, too."""

    rounding = 2.0

    def __init__(self, moe: bool = False) -> None:
        super().__init__("glm4v_moe" if moe else "glm4v")

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        import transformers

        name = "Glm4vMoe" if self.model_type.endswith("moe") else "Glm4v"
        vision = dict(
            depth=TOWER_LAYERS, hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=4, patch_size=8, image_size=64
        )
        text = {**LLM, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
        if self.model_type.endswith("moe"):
            text["rope_parameters"] = {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
            text |= dict(
                n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1, first_k_dense_replace=1
            )
        ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END)
        text |= changes.pop("text", {})
        vision |= changes.pop("tower", {})
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids, **changes)
        return getattr(transformers, f"{name}ForConditionalGeneration"), config

    def projected(self, model: Any, features: Tensor) -> Tensor:
        visual = model.model.visual
        patches = visual.post_layernorm(features.reshape(-1, 2, 2, features.shape[-1] // JOINS)).permute(0, 3, 1, 2)
        return visual.merger(visual.downsample(patches).flatten(1)).view(*features.shape[:-1], -1)


class Qwen35(QwenVL):
    """Qwen3.5: three of five LLM layers are gated delta nets."""

    cut = True
    noise = 2e-4
    rounding = 4.0
    refused: ClassVar[dict[str, str]] = QwenVL.refused | {
        **dict.fromkeys(("O8", "O8b"), "freezes"),
        "O7": "static cache",
        "O12": "later turn",
        "O12b": "stateful models",  # transformers itself
    }

    def __init__(self, moe: bool = False) -> None:
        super().__init__("qwen3_5_moe" if moe else "qwen3_5")

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        import transformers

        name, moe = ("Qwen3_5Moe", True) if self.model_type.endswith("moe") else ("Qwen3_5", False)
        vision = dict(depth=TOWER_LAYERS, hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=4, patch_size=8)
        vision |= dict(num_position_embeddings=64, **changes.pop("tower", {}))
        linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
        kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"]
        text = {**LLM, **linear, "head_dim": 16, "layer_types": kinds, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32) if moe else {}
        text |= changes.pop("text", {})
        ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids, **changes)
        return getattr(transformers, f"{name}ForConditionalGeneration"), config
