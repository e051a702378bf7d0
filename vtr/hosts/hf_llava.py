"""LLaVA-1.5 and LLaVA-NeXT on Hugging Face transformers, with CLIP and SigLIP towers.

Internals used: `model.model.{vision_tower, multi_modal_projector, language_model}`, `vision_tower.encoder.layers`,
`config.{image_token_id, vision_feature_layer, vision_feature_select_strategy, image_grid_pinpoints}`, and for NeXT
`model.model.pack_image_features`, through which coordinates are sent to learn the layout. Read at transformers 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._layout import Grid, Kind, Layout, views_of_one_image
from vtr.hosts._protocol import Host, check_layer_kinds, feature_layers
from vtr.hosts._towers import RowTower, llm_stack, transformers_blocks
from vtr.hosts.hf_mistral3 import pixtral
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
        language=llm_stack(llm),
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
    """LLaVA-1.5: every image is one view, its tokens in raster order. A Pixtral tower is that of `hf_mistral3`."""
    if model.config.vision_config.model_type == "pixtral":
        return pixtral(model)
    facts = _tower_facts(model)
    layout = views_of_one_image([facts["tower"].patch_grid])

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        return [layout] * len(arguments["pixel_values"])

    return Host(**facts, most_tokens=layout.tokens, layouts=layouts, default_layout=layout)


@register_host("llava_next")
def llava_next(model: Any) -> Host:
    """LLaVA-NeXT: thumbnail, then the unpadded canvas of crops row by row, each row closed by a newline token."""
    base, strategy = getattr(model, "model", model), model.config.vision_feature_select_strategy

    def packed(features: Tensor, size: Tensor, newline: Tensor, _arguments: dict[str, Any]) -> Tensor:
        return base.pack_image_features([features], size, vision_feature_select_strategy=strategy, image_newline=newline)[0][0]

    return anyres_host(model, packed)


def anyres_host(
    model: Any, packed: Callable[..., Tensor], crops: Callable[[dict[str, Any]], list[bool]] | None = None, limit: float = math.inf
) -> Host:
    """Returns the host of a model whose images are a thumbnail and crops.

    Args:
        model: which.
        packed: the family's own packing: `(features (views, area, C), size (1, 2), newline (C,), arguments) -> (L, C)`.
        crops: `arguments -> for every image, whether it has crops`; None = all have.
        limit: crops whose tokens the canvas can hold; larger ones are interpolated.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

    facts = _tower_facts(model)
    config, grid, area = model.config, facts["tower"].patch_grid, facts["tower"].area
    side = config.vision_config.image_size
    known: dict[Any, Layout] = {}
    pinpoints = [list(p) for p in config.image_grid_pinpoints]

    def layout_of(size: Grid, cut: bool, arguments: dict[str, Any]) -> Layout:
        views = int(image_size_to_num_patches(list(size), pinpoints, side)) if cut else 1
        shape = get_anyres_image_grid_shape(list(size), pinpoints, side) if cut else (0, 0)
        return anyres_layout(lambda *given: packed(*given, arguments), grid, size, views, shape)

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        sizes = arguments.get("image_sizes")
        if sizes is None:
            raise VtrError(f"{config.model_type}: image_sizes is needed to lay out the crops, got None; pass all outputs of the processor")
        sizes = [(int(h), int(w)) for h, w in torch.as_tensor(sizes).tolist()]
        found = []
        for size, cut in zip(sizes, [True] * len(sizes) if crops is None else crops(arguments), strict=True):
            key = (size, cut, arguments.get("vision_aspect_ratio"))
            if key not in known and len(known) < 4096:
                known[key] = layout_of(size, cut, arguments)
            found.append(known[key] if key in known else layout_of(size, cut, arguments))
        return found

    most = max(int(image_size_to_num_patches(p, pinpoints, side)) - 1 for p in pinpoints)
    return Host(**facts, most_tokens=int((1 + min(most, limit)) * area), layouts=layouts, anyres=True)


def anyres_layout(packed: Callable[[Tensor, Tensor, Tensor], Tensor], grid: Grid, size: Grid, views: int, crops: Grid) -> Layout:
    """Learns how an image is packed, by running the family's own packing on the numbers of its patches.

    Args:
        packed: `(features (views, area, 2), size (1, 2), newline (2,)) -> (L, 2)`.
        grid: patches of a view.
        size: of the image in pixels.
        views: thumbnail and crops; crops: `(rows, cols)` of the latter.
    """
    area = grid[0] * grid[1]
    numbers = torch.arange(views * area)
    features = torch.stack([numbers, numbers**2], -1).double().view(views, area, 2)  # the mean of squares tells that patches were mixed
    found = packed(features, torch.tensor([size]), torch.full((2,), -1.0, dtype=torch.float64))
    newline = found[:, 0] < 0
    closes = newline.long().cumsum(0) - newline.long()  # newlines before this position: the number of the one that closes it
    line = torch.where((torch.arange(len(found)) < area) & (views > 1), -1, closes)
    patch = torch.where(newline, -1, found[:, 0].round().long())
    if torch.equal(found[~newline], features.flatten(0, 1)[patch[~newline]]):
        return Layout((grid,) * views, patch, line, (int(crops[0]), int(crops[1])), size)
    # the canvas was interpolated: a view of its own behind the thumbnail
    rows = int(newline.sum())
    canvas = (rows, (len(found) - area) // rows - 1)
    patch = torch.where(newline, -1, (~newline).long().cumsum(0) - 1)
    tokens = area + canvas[0] * canvas[1]
    closed = f"the {views} views of an image of {size[0]} x {size[1]} pixels are interpolated to {tokens} tokens, which mix patches"
    return Layout((grid, canvas), patch, line, (1, 1), size, inputs=views, closed=closed)
