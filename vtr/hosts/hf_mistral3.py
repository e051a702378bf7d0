"""Mistral 3, and Pixtral inside LLaVA, on Hugging Face transformers: images of any grid in one packed sequence.

Internals used: `model.model.{vision_tower, multi_modal_projector, language_model}`, `vision_tower.{transformer.layers, patch_size}`,
`config.{spatial_merge_size, vision_feature_layer, vision_feature_select_strategy}`; of a block its parts `attention`, `feed_forward`,
`attention_norm`, `ffn_norm`; that `image_sizes` say how much of `pixel_values (images, 3, H, W)` is no filler. Read at transformers 5.24.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from vtr.hosts._host import Host, check_layer_kinds, feature_layers
from vtr.hosts._layout import Kind, Layout, views_of_one_image
from vtr.hosts._towers import Stack, Tower, transformers_blocks
from vtr.registry import register_host
from vtr.types import VtrError


@register_host("mistral3")
def mistral3(model: Any) -> Host:
    """Every image is one view of its own grid; `spatial_merge_size ** 2` patches (2 x 2) become one visual token.

    Rows of an image are closed by break tokens of the prompt, which are text and stay.
    """
    return _pixtral(model, int(model.config.spatial_merge_size))


def pixtral(model: Any) -> Host:
    """Pixtral inside LLaVA: as Mistral 3, but every patch becomes one visual token."""
    if model.config.vision_feature_select_strategy != "full":
        raise VtrError("llava: vision_feature_select_strategy='default' cuts off the first patch of a tower without CLS; use 'full'")
    return _pixtral(model, 1)


def _pixtral(model: Any, side: int) -> Host:
    config, base = model.config, getattr(model, "model", model)
    llm, tower = base.language_model, base.vision_tower
    check_layer_kinds(config.model_type, llm.config)
    patch = int(tower.patch_size)

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        pixels, sizes = arguments["pixel_values"], arguments.get("image_sizes")
        if sizes is None:  # nothing is filler
            sizes = [pixels.shape[-2:]] * len(pixels)
        grids = [(int(h) // (patch * side), int(w) // (patch * side), int(h), int(w)) for h, w in torch.as_tensor(sizes).tolist()]
        return [views_of_one_image([(rows, cols)], image_size=(h, w)) for rows, cols, h, w in grids]

    return Host(
        name=config.model_type,
        model=model,
        base=base,
        projector=base.multi_modal_projector,
        language=Stack(
            **transformers_blocks(llm, llm.layers, ("input_layernorm", "post_attention_layernorm")),
            down=attrgetter("mlp.down_proj"),
            norm=getattr(llm, "norm", None),
        ),
        tower=Tower(
            module=tower,
            blocks=tower.transformer.layers,
            attention=attrgetter("attention"),
            mlp=attrgetter("feed_forward"),
            before_attention=attrgetter("attention_norm"),
            before_mlp=attrgetter("ffn_norm"),
            feature_layers=feature_layers(config.vision_feature_layer, len(tower.transformer.layers)),
            patch_size=patch,
            joins=side**2,
        ),
        placeholder_ids={"image": config.image_token_id},
        layouts=layouts,
        closed="the Pixtral tower packs images under one mask, which is not followed yet",
        stages=("boundary", "prefill"),
    )
