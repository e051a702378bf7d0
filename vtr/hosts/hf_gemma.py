"""Gemma 3 and Gemma 4 on Hugging Face transformers: images that see themselves; sliding and full layers with rotary tables of their own.

Internals used: `model.model.{vision_tower, multi_modal_projector, language_model}`, `vision_tower.{encoder.layers, post_layernorm}`,
`config.{mm_tokens_per_image, image_token_id}`, and the masks by type of layer that the base model hands to its language model; of Gemma 4
`embed_vision`, `vision_config.{patch_size, pooling_kernel_size}`, `text_config.{use_bidirectional_attention, num_kv_shared_layers,
hidden_size_per_layer_input}` and the language model's argument
`per_layer_inputs`. Read at transformers 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from vtr.hosts._layout import Kind, Layout, views_of_one_image
from vtr.hosts._protocol import Host, check_layer_kinds
from vtr.hosts._towers import JoinedTower, RowTower, llm_stack, transformers_blocks
from vtr.registry import register_host
from vtr.types import VtrError

SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""What Gemma 4's processors take as `max_soft_tokens`; `_SUPPORTED_SOFT_TOKENS` of transformers/models/gemma4/image_processing_gemma4.py."""


@register_host("gemma3")
def gemma3(model: Any) -> Host:
    """Every image, and every crop of pan and scan, is one view whose patches are averaged block by block."""
    config, base = model.config, getattr(model, "model", model)
    vision, llm = config.vision_config, base.language_model
    tower = getattr(base.vision_tower, "vision_model", base.vision_tower)
    check_layer_kinds("gemma3", llm.config)
    side, patches = int(config.mm_tokens_per_image**0.5), vision.image_size // vision.patch_size
    block = patches // side
    members = rearrange(torch.arange(patches**2), "(r i c j) -> (r c) (i j)", r=side, c=side, i=block)
    layout = views_of_one_image([(side, side)])

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        return [layout] * len(arguments["pixel_values"])

    return Host(
        name="gemma3",
        model=model,
        base=base,
        projector=base.multi_modal_projector,
        language=llm_stack(llm, "pre_feedforward_layernorm"),
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
        stages=("tower", "boundary", "prefill", "decode"),
    )


@register_host("gemma4", "gemma4_unified")
def gemma4(model: Any) -> Host:
    """Every image is one view of its own grid, averaged block by block; without a vision tower every patch is a token.

    The small models (E2B, E4B) give every layer an embedding of the token's own, or let late layers share keys of earlier ones: their tokens
    can go at the boundary only.
    """
    config, base = model.config, getattr(model, "model", model)
    text, llm = config.get_text_config(), base.language_model
    check_layer_kinds(config.model_type, llm.config)
    tower = getattr(base, "vision_tower", None)
    block = 1 if tower is None else int(config.vision_config.pooling_kernel_size)

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        if arguments.get("image_position_ids") is None:
            raise VtrError(
                f"{config.model_type}: image_position_ids is needed to lay out the images, got None; pass all outputs of the processor"
            )
        sides = (arguments["image_position_ids"].amax(1) + 1).tolist()  # columns, rows
        return [views_of_one_image([(rows // block, cols // block)]) for cols, rows in sides]

    side = int(config.vision_config.patch_size) * int(config.vision_config.pooling_kernel_size)
    shared, own = getattr(text, "num_kv_shared_layers", 0), bool(getattr(text, "hidden_size_per_layer_input", 0))
    return Host(
        name=config.model_type,
        model=model,
        base=base,
        projector=base.embed_vision,
        language=llm_stack(llm, "pre_feedforward_layernorm", extra=_no_shared_keys),
        tower=RowTower(
            **transformers_blocks(base.embed_vision if tower is None else tower, () if tower is None else tower.encoder.layers, ("", "")),
            feature_layers=(0 if tower is None else len(tower.encoder.layers) - 1,),
            patch_size=int(config.vision_config.patch_size),
        ),
        placeholder_ids={"image": config.image_token_id},
        layouts=layouts,
        renumber=False,
        bidirectional=getattr(text, "use_bidirectional_attention", None) == "vision",
        closed="there is none" if tower is None else "it pads images to one length and pools them by position",
        shared=shared,
        per_token=("per_layer_inputs",) if own else (),
        token_budgets={tokens * side**2: tokens for tokens in SOFT_TOKENS},
        stages=("boundary",) if shared or own else ("boundary", "prefill", "decode"),
    )


def _no_shared_keys() -> dict[str, Any]:
    """Returns what an attention of Gemma 4 writes its keys to, for later layers."""
    return {"shared_kv_states": {}}
