"""SAM's image encoders: timm's `VisionTransformerSAM` and Hugging Face's `SamModel` and `SamVisionModel`.

Tokens are clustered by attention window and restored before the neck, or wherever else a block's output is read. Blocks with global attention
see the whole smaller grid, cells of padding included. Both libraries resize the decomposed relative positions linearly to any grid.

Internals used, timm 1.0.31: `patch_embed.{proj, grid_size}`, `blocks`, `rope_global`, `forward_intermediates`; transformers 5.17 and 5.23:
`vision_encoder.{patch_embed.projection, layers}`; of every block `window_size`, 0 for global attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtr.hosts._windows import Swaps, WindowedHost
from vtr.hosts.timm_vit import entries
from vtr.registry import register_host
from vtr.types import VtrError


@register_host("timm:VisionTransformerSAM")
def timm_sam(model: Any) -> WindowedHost:
    """timm's SAM encoder, also behind `features_only=True`."""
    if model.rope_global is not None:
        raise VtrError("timm:VisionTransformerSAM: with rotary positions its blocks take one fixed grid; use a model with use_rope=False")

    embed = model.patch_embed
    return _host("timm:VisionTransformerSAM", model, model.blocks, embed.proj, embed.grid_size, entries=entries(model), dynamic=True)


@register_host("sam", "sam_vision_model")
def hf_sam(model: Any) -> WindowedHost:
    """Hugging Face's SAM: whole, its vision model, or its vision encoder."""
    encoder = model
    while hasattr(encoder, "vision_encoder"):
        encoder = encoder.vision_encoder
    if not hasattr(encoder, "layers"):
        raise VtrError(f"{model.config.model_type}: {type(model).__name__} has no vision encoder")

    def read(arguments: Mapping[str, Any]) -> Sequence[int] | None:
        asked = arguments.get("output_hidden_states")
        return None if asked or (asked is None and encoder.config.output_hidden_states) else ()

    side = encoder.config.image_size // encoder.config.patch_size
    projection = encoder.patch_embed.projection
    return _host(model.config.model_type, encoder, encoder.layers, projection, (side, side), entries={"forward": read})


def _host(name: str, model: Any, blocks: Sequence[Any], patches: Any, grid: tuple[int, int], **facts: Any) -> WindowedHost:
    windows = {block.window_size for block in blocks} - {0}
    if not windows:
        raise VtrError(f"{name}: has no block with attention windows, so there is nothing to cluster by")
    return WindowedHost(
        name=name,
        model=model,
        blocks=blocks,
        patches=patches,
        prefix_tokens=0,
        has_cls=False,
        patch_grid=(int(grid[0]), int(grid[1])),
        window=int(windows.pop()),
        end=len(blocks),
        shrink=_shrink,
        **facts,
    )


def _shrink(block: Any, side: int) -> Swaps:
    return ((block, "window_size", side),) if block.window_size else ()
