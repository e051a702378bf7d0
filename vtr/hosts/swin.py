"""Swin: timm's `SwinTransformer` (also as `features_only`), Hugging Face's Swin models, and Mask2Former on a Swin backbone.

Tokens are clustered by window inside the longest stage, the third in all published configurations, and restored at its end, before patch
merging and the stage's output norm. Shifted windows of k x k are shifted by k // 2, in the roll and in its mask.

Internals used, timm 1.0.31: `patch_embed.proj`, `SwinTransformerStage.blocks`, of a block `window_size`, `window_area`, `shift_size`,
`dynamic_mask`, `attn.{relative_position_bias_table, _get_rel_pos_bias}`. transformers 5.17 and 5.23: `SwinModel.{embeddings.patch_embeddings,
encoder.layers[].blocks}`, of a block its argument `input_dimensions`, `window_size`, `shift_size`, `attention.relative_position_bias`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtr.hosts._dense import Grid
from vtr.hosts._windows import Swaps, WindowedHost, smaller_bias
from vtr.registry import register_host
from vtr.types import VtrError


@register_host("timm:SwinTransformer", "timm:FeatureListNet")
def timm_swin(model: Any) -> WindowedHost:
    """timm's Swin; `FeatureListNet` is what `features_only=True` makes of it."""
    from timm.models.swin_transformer import SwinTransformerStage

    name = f"timm:{type(model).__name__}"
    stages = [module.blocks for module in model.modules() if isinstance(module, SwinTransformerStage)]
    if not stages:
        raise VtrError(f"{name}: holds no SwinTransformerStage; only Swin's features_only models are known")
    embed = model.patch_embed
    return _host(name, model, stages, embed.proj, embed.grid_size, _shrink_timm, dynamic=not embed.strict_img_size)


@register_host("swin", "mask2former")
def hf_swin(model: Any) -> WindowedHost:
    """Any Swin model of transformers, or one that has it as its backbone."""
    from transformers.models.swin.modeling_swin import SwinModel

    found = [module for module in model.modules() if isinstance(module, SwinModel)]
    if not found:
        backbone = type(model.base_model.pixel_level_module.encoder).__name__
        raise VtrError(f"{model.config.model_type}: its backbone {backbone} is not Swin; only Swin backbones are known")
    swin = found[0]
    stages = [stage.blocks for stage in swin.encoder.layers]
    embed = swin.embeddings.patch_embeddings
    return _host(model.config.model_type, swin, stages, embed.projection, embed.grid_size, _shrink_hf, dynamic=True, flat=True)


def _host(name: str, model: Any, stages: Sequence[Any], patches: Any, grid: Grid, shrink: Any, **facts: Any) -> WindowedHost:
    lengths = [len(blocks) for blocks in stages]
    stage = max(range(len(lengths)), key=lambda i: (lengths[i], i))
    window = stages[stage][0].window_size
    sides = set(window) if isinstance(window, tuple) else {window}
    if len(sides) > 1:
        raise VtrError(f"{name}: its attention windows are {window[0]} x {window[1]}; only square ones can be clustered")
    first = sum(lengths[:stage])
    return WindowedHost(
        name=name,
        model=model,
        blocks=[block for blocks in stages for block in blocks],
        patches=patches,
        prefix_tokens=0,
        has_cls=False,
        patch_grid=(int(grid[0]), int(grid[1])),
        window=int(sides.pop()),
        first=first,
        end=first + lengths[stage],
        halvings=stage,
        shrink=shrink,
        **facts,
    )


def _shrink_timm(block: Any, side: int) -> Swaps:
    bias = smaller_bias(block.attn.relative_position_bias_table, block.window_size[0], side)
    shift = tuple(side // 2 if old else 0 for old in block.shift_size)
    sizes = ((block, "window_size", (side, side)), (block, "window_area", side * side), (block, "shift_size", shift))
    return (*sizes, (block, "dynamic_mask", True), (block.attn, "_get_rel_pos_bias", bias))  # the mask in the buffer is of the full grid


def _shrink_hf(block: Any, side: int) -> Swaps:
    table = block.attention.relative_position_bias
    bias = smaller_bias(table.relative_position_bias_table, table.window_size[0], side)
    shift = side // 2 if block.shift_size else 0
    return (block, "window_size", side), (block, "shift_size", shift), (table, "forward", bias)
