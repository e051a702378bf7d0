"""Small models with a Pixtral tower: Mistral 3, Ministral 3, and LLaVA around it; images of any grid, rows closed by break tokens."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vtr.testing.families import IMAGE, LLM, TOWER, Family, Visual, own_key_seen

BREAK, END, PATCH, MOST = 93, 92, 8, 96
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
POSITIONS = {"rope_parameters": ROPE, "max_position_embeddings": 64}
"""Of Ministral 3, whose attention also multiplies queries by a number that grows with their position."""


class Pixtral(Family):
    """A Pixtral tower whose patches are joined `side` x `side`: Mistral 3 with 2, LLaVA with 1."""

    has_cls = False

    def __init__(self, side: int, backbone: str = "mistral") -> None:
        self.side, self.backbone = side, backbone
        if backbone == "ministral3":
            self.refused = {"O10": "takes position ids"}  # type: ignore[misc]

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import (
            AutoConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
            Mistral3Config,
            Mistral3ForConditionalGeneration,
            PixtralVisionConfig,
        )

        backbone = changes.pop("backbone", self.backbone)
        text = {**LLM, "sliding_window": None, **(POSITIONS if backbone == "ministral3" else {}), **changes.pop("text", {})}
        settings = dict(
            vision_config=PixtralVisionConfig(**{**TOWER, "image_size": MOST, **changes.pop("tower", {})}),
            text_config=AutoConfig.for_model(backbone, **text),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
        if self.side == 1:
            return LlavaForConditionalGeneration, LlavaConfig(**{**settings, "vision_feature_select_strategy": "full", **changes})
        return Mistral3ForConditionalGeneration, Mistral3Config(**settings, spatial_merge_size=self.side, **changes)

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        unit = 2 * PATCH  # also without joining, so that images stay small
        return [(max(shot.height // unit, 1) * 2 // self.side, max(shot.width // unit, 1) * 2 // self.side)]

    def placeholders(self, shot: Visual, count: int) -> list[int]:
        rows, cols = self.grids(shot)[0]
        return [*(([IMAGE] * cols + [BREAK]) * rows)[:-1], END]

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        return torch.randn(1, 3, MOST, MOST, generator=random)

    def beside(self, shots: list[Visual]) -> dict[str, Tensor]:
        unit = PATCH * self.side
        return {"image_sizes": torch.tensor([[rows * unit, cols * unit] for shot in shots for rows, cols in self.grids(shot)])}

    def tower_layers(self, model: Any) -> Any:
        return model.model.vision_tower.transformer.layers

    def before_mlp(self, layer: Any) -> Any:
        return layer.ffn_norm

    def projected(self, model: Any, features: Tensor) -> Tensor:
        projector = model.model.multi_modal_projector
        if self.side == 1:
            return projector(features)
        whole = projector.norm(features.unflatten(-1, (self.side**2, -1)))
        merged = whole.transpose(-1, -2).flatten(-2) @ projector.patch_merger.merging_layer.weight.T  # as `unfold` puts channels
        return projector.linear_2(projector.act(projector.linear_1(merged)))

    def _order(self, shot: Visual) -> Tensor:
        """Returns the patches of an image token by token."""
        rows, cols = self.grids(shot)[0]
        return rearrange(torch.arange(rows * cols * self.side**2), "(r i c j) -> (r c i j)", i=self.side, c=cols, j=self.side)

    def units(self, hidden: Tensor, shots: list[Visual]) -> Tensor:
        orders = [self._order(shot) for shot in shots]
        parts = hidden.reshape(-1, hidden.shape[-1]).split([len(order) for order in orders])
        units = [part[order].reshape(-1, self.side**2 * hidden.shape[-1]) for part, order in zip(parts, orders, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(units, batch_first=True)

    def with_units(self, hidden: Tensor, units: Tensor, shots: list[Visual]) -> Tensor:
        parts = []
        for own, order in zip(units, map(self._order, shots), strict=True):
            patches = own.reshape(-1, hidden.shape[-1])[: len(order)]
            parts.append(patches[order.argsort()])
        return torch.cat(parts).reshape(hidden.shape)

    def tower_masks(self, model: Any, layer: int, shots: list[Visual], bias: Tensor) -> list[Tensor]:
        blocks = []
        for own, order in zip(bias, map(self._order, shots), strict=True):
            weight = own.repeat_interleave(self.side**2)[: len(order)][order.argsort()]
            blocks.append(own_key_seen(weight[None])[0, 0])
        whole = torch.block_diag(*[torch.ones_like(block) for block in blocks]).bool()
        return [torch.block_diag(*blocks).masked_fill(~whole, torch.finfo(bias.dtype).min)[None, None]]
