"""LLaVA-1.5 and LLaVA-NeXT on Hugging Face transformers, with CLIP and SigLIP towers.

Internals used: `model.model.{vision_tower, multi_modal_projector, language_model}`, `vision_tower.encoder.layers`,
`config.{image_token_id, vision_feature_layer, vision_feature_select_strategy, image_grid_pinpoints}`, and for NeXT
`model.model.pack_image_features`, through which coordinates are sent to learn the layout. Read at transformers 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch

from vtr.hosts._host import Host, check_layer_kinds, feature_layers
from vtr.hosts._layout import Kind, Layout, views_of_one_image
from vtr.hosts._towers import RowTower, Stack, transformers_blocks
from vtr.registry import register_host
from vtr.types import VtrError


def _tower_facts(model: Any) -> dict[str, Any]:
    """Returns the part of a Host that LLaVA and LLaVA-NeXT share."""
    config, base = model.config, getattr(model, "model", model)
    tower = base.vision_tower
    vision = config.vision_config
    has_cls = str(vision.model_type).startswith("clip")
    if not has_cls and not str(vision.model_type).startswith("siglip"):
        raise VtrError(f"{config.model_type}: the tower must be CLIP or SigLIP, got {vision.model_type!r}; register a host for it")
    encoder = tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder
    if config.vision_feature_select_strategy == "full" and has_cls:
        raise VtrError(
            f"{config.model_type}: vision_feature_select_strategy='full' makes the CLS token a visual token, which has no place in the "
            "patch grid; use 'default'"
        )
    if config.vision_feature_select_strategy == "default" and not has_cls:
        raise VtrError(
            f"{config.model_type}: vision_feature_select_strategy='default' cuts off the first patch of a tower without CLS; use 'full'"
        )
    check_layer_kinds(config.model_type, base.language_model.config)
    side = vision.image_size // vision.patch_size
    llm = base.language_model
    return dict(
        name=config.model_type,
        model=model,
        base=base,
        projector=base.multi_modal_projector,
        language=Stack(
            **transformers_blocks(llm, llm.layers, ("input_layernorm", "post_attention_layernorm")),
            down=attrgetter("mlp.down_proj"),
            norm=getattr(llm, "norm", None),
        ),
        tower=RowTower(
            **transformers_blocks(tower, encoder.layers, ("layer_norm1", "layer_norm2")),
            embeddings=getattr(getattr(tower, "vision_model", tower), "embeddings", None),
            prefix_tokens=int(has_cls),
            has_cls=has_cls,
            patch_grid=(side, side),
            patch_size=vision.patch_size,
            feature_layers=feature_layers(config.vision_feature_layer, len(encoder.layers)),
        ),
        placeholder_ids={"image": config.image_token_id},
    )


@register_host("llava")
def llava(model: Any) -> Host:
    """LLaVA-1.5: every image is one view, its tokens in raster order."""
    facts = _tower_facts(model)
    layout = views_of_one_image([facts["tower"].patch_grid])

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        return [layout] * len(arguments["pixel_values"])

    return Host(**facts, most_tokens=layout.tokens, layouts=layouts, default_layout=layout)


@register_host("llava_next")
def llava_next(model: Any) -> Host:
    """LLaVA-NeXT: thumbnail, then the unpadded canvas of crops row by row, each row closed by a newline token."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

    facts = _tower_facts(model)
    config, base = model.config, facts["base"]
    area = facts["tower"].area
    side = config.vision_config.image_size
    pinpoints = [list(p) for p in config.image_grid_pinpoints]

    @lru_cache(maxsize=4096)
    def layout_of(height: int, width: int) -> Layout:
        size = torch.tensor([height, width])
        views = image_size_to_num_patches(size, pinpoints, side)
        rows, cols = get_anyres_image_grid_shape(size, pinpoints, side) if views > 1 else (0, 0)
        ids = torch.arange(views * area, dtype=torch.float32).view(views, area, 1)
        # the family's own packing, run on patch ids instead of features
        packed, _ = base.pack_image_features(
            [ids],
            size[None],
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=torch.tensor([-1.0]),
        )
        patch = packed[0][:, 0].round().long()
        newline = patch < 0
        closes = newline.long().cumsum(0) - newline.long()  # newlines before this position: the number of the one that closes it
        line = torch.where((torch.arange(len(patch)) < area) & (views > 1), -1, closes)
        return Layout((facts["tower"].patch_grid,) * int(views), patch, line, (int(rows), int(cols)), (height, width))

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        sizes = arguments.get("image_sizes")
        if sizes is None:
            raise VtrError("llava_next: image_sizes is needed to lay out the crops, got None; pass all outputs of the processor")
        return [layout_of(int(h), int(w)) for h, w in torch.as_tensor(sizes).tolist()]

    most = max(image_size_to_num_patches(torch.tensor(p), pinpoints, side) for p in pinpoints)
    return Host(**facts, most_tokens=int(most) * area, layouts=layouts, anyres=True)
