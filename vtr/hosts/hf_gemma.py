"""Gemma 3 on Hugging Face transformers: 256 pooled tokens an image, which see each other; sliding and full layers with rotary tables of their own.

Internals used: `model.model.{vision_tower, multi_modal_projector, language_model}`, `vision_tower.{encoder.layers, post_layernorm}`,
`config.{mm_tokens_per_image, image_token_id}`, and the masks by type of layer that the base model hands to its language model. Read at
transformers 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from vtr.hosts._host import Host, check_layer_kinds
from vtr.hosts._layout import Kind, Layout, views_of_one_image
from vtr.hosts._towers import JoinedTower, Stack, transformers_blocks
from vtr.registry import register_host


@register_host("gemma3")
def gemma3(model: Any) -> Host:
    """Every image, and every crop of pan and scan, is one view whose patches are averaged block by block."""
    config, base = model.config, getattr(model, "model", model)
    vision, llm = config.vision_config, base.language_model
    tower = getattr(base.vision_tower, "vision_model", base.vision_tower)
    check_layer_kinds("gemma3", llm.config)
    side, patches = int(config.mm_tokens_per_image**0.5), vision.image_size // vision.patch_size
    block = patches // side
    members = torch.arange(patches**2).view(side, block, side, block).transpose(1, 2).reshape(side**2, block**2)
    layout = views_of_one_image([(side, side)])

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        return [layout] * len(arguments["pixel_values"])

    return Host(
        name="gemma3",
        model=model,
        base=base,
        projector=base.multi_modal_projector,
        language=Stack(
            **transformers_blocks(llm, llm.layers, ("input_layernorm", "pre_feedforward_layernorm")),
            down=attrgetter("mlp.down_proj"),
            norm=getattr(llm, "norm", None),
        ),
        tower=JoinedTower(
            **transformers_blocks(base.vision_tower, tower.encoder.layers, ("layer_norm1", "layer_norm2")),
            feature_layers=(len(tower.encoder.layers) - 1,),
            patch_size=vision.patch_size,
            patch_grid=(side, side),
            joins=block**2,
            members=members,
            restore=(tower.post_layernorm,),
        ),
        placeholder_ids={"image": config.image_token_id},
        layouts=layouts,
        default_layout=layout,
        most_tokens=layout.tokens,
        renumber=False,
        bidirectional=True,
        stages=("tower", "boundary", "prefill"),
    )
