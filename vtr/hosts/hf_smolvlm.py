"""SmolVLM, SmolVLM 2 and Idefics 3 on Hugging Face transformers: tiles of one grid, patches joined into tokens by pixel shuffle.

Internals used: `model.model.{vision_model, connector, text_model}`, `connector.{pixel_shuffle, scale_factor}`,
`vision_model.{encoder.layers, post_layernorm}`; of a block its parts `self_attn`, `mlp`, `layer_norm1`, `layer_norm2`; that tiles of zeros in
`pixel_values (B, tiles, 3, H, W)` are filler. Read at transformers 5.24.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._layout import Kind, Layout, views_of_one_image
from vtr.hosts._protocol import Host, check_layer_kinds
from vtr.hosts._towers import JoinedTower, llm_stack, transformers_blocks
from vtr.registry import register_host
from vtr.types import VtrError


@register_host("smolvlm", "idefics3")
def smolvlm(model: Any) -> Host:
    """All tiles in a row of `pixel_values`, those of one prompt, are the views of one image: nothing tells where an image of several begins.

    Every tile stands between text of its own, which is never removed. Text in front of the last tile of a prompt is no question to methods. Where
    images are frames every tile is one, so that the processor must not split them.
    """
    config, base = model.config, getattr(model, "model", model)
    vision, llm, tower = config.vision_config, base.text_model, base.vision_model
    check_layer_kinds(config.model_type, llm.config)
    side, factor = vision.image_size // vision.patch_size, int(base.connector.scale_factor)
    # the family's own shuffle, run on the numbers of patches
    numbers = torch.arange(side**2, dtype=torch.float32).view(1, -1, 1)
    members = base.connector.pixel_shuffle(numbers, factor)[0].long()
    grid = (side // factor, side // factor)

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        pixels, seen = arguments["pixel_values"], arguments.get("pixel_attention_mask")
        real = (pixels.to(base.dtype) != 0).flatten(2).any(2)
        if pixels.shape[-2:] != (vision.image_size, vision.image_size):
            raise VtrError(
                f"{config.model_type}: tiles must be {vision.image_size} x {vision.image_size} pixels, the size of the checkpoint, got "
                f"{pixels.shape[-2]} x {pixels.shape[-1]}; let the processor split or resize images"
            )
        counts = [count for count in real.sum(1).tolist() if count]
        if not counts:
            raise VtrError(
                f"{config.model_type}: pixel_values must hold a tile that is not zero, got none; leave them out for a prompt of text"
            )
        closed = "" if seen is None or _whole(seen, real) else "pixel_attention_mask hides pixels of a tile from its attention"
        return [replace(views_of_one_image([grid] * count), closed=closed) for count in counts]

    return Host(
        name=config.model_type,
        model=model,
        base=base,
        projector=base.connector,
        language=llm_stack(llm),
        tower=JoinedTower(
            **transformers_blocks(tower, tower.encoder.layers, ("layer_norm1", "layer_norm2")),
            feature_layers=(len(tower.encoder.layers) - 1,),
            patch_size=vision.patch_size,
            patch_grid=grid,
            joins=factor**2,
            members=members,
            restore=(tower.post_layernorm,),
        ),
        placeholder_ids={"image": config.image_token_id},
        layouts=layouts,
        tiles=True,
        one_view={"do_image_splitting": False},
        stages=("tower", "boundary", "prefill", "decode"),
    )


def _whole(seen: Tensor, real: Tensor) -> bool:
    """Whether `pixel_attention_mask (B, tiles, H, W)` shows every pixel of the tiles that are `real (B, tiles)`."""
    return bool((seen.bool().flatten(2).all(2) | ~real).all())
