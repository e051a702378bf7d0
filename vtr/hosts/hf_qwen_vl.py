"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, GLM-4V and their MoEs on Hugging Face transformers: images and videos of any grid in one packed
sequence. Videos of GLM-4V are refused, whose placeholders are those of images.

Internals used: `model.model.{visual, language_model, rope_deltas}`, `visual.{blocks, merger, deepstack_merger_list, spatial_merge_size,
window_size, patch_size}`, GLM-4V's `visual.post_layernorm`; of a block its parts `attn`, `mlp`, `norm1`, `norm2` and its arguments `cu_seqlens`
and `position_embeddings`; of the text model of Qwen3-VL its arguments `visual_pos_masks` and `deepstack_visual_embeds`. Read at transformers
5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._layout import Kind, Layout, views_of_one_image
from vtr.hosts._protocol import Host, check_layer_kinds
from vtr.hosts._towers import PackedTower, llm_stack
from vtr.registry import register_host
from vtr.types import VtrError


@register_host("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe")
def qwen_vl(model: Any) -> Host:
    """Every image is one view of its own grid, and so is every frame of a video, which stands for `temporal_patch_size` pictures (2);
    `spatial_merge_size ** 2` patches (2 x 2) become one visual token."""
    config, base = model.config, getattr(model, "model", model)
    visual, llm = base.visual, base.language_model
    check_layer_kinds(config.model_type, llm.config, linear=True)
    side, patch = int(visual.spatial_merge_size), int(config.vision_config.patch_size)
    deepstack = tuple(getattr(visual, "deepstack_merger_list", ()))
    if len(deepstack) >= len(llm.layers):
        raise VtrError(
            f"{config.model_type}: adds features behind {len(deepstack)} LLM layers, all {len(llm.layers)}; fewer can be followed"
        )

    def layouts(kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        found = []
        for frames, rows, cols in torch.as_tensor(arguments[f"{kind}_grid_thw"]).tolist():
            found.append(views_of_one_image([(rows // side, cols // side)] * frames, kind, (rows * patch, cols * patch)))
        return found

    kinds: tuple[Kind, ...] = ("image",) if config.model_type.startswith("glm") else ("image", "video")

    def next_positions(columns: Tensor) -> Tensor:
        deltas = base.rope_deltas.to(columns.device)
        deltas = deltas.repeat_interleave(len(columns) // len(deltas), dim=0)
        return (columns + deltas)[None].expand(3, -1, -1)

    return Host(
        name=config.model_type,
        model=model,
        base=base,
        projector=getattr(visual, "post_layernorm", visual.merger),  # what joins patches begins here
        language=llm_stack(llm),
        tower=PackedTower(
            module=visual,
            blocks=visual.blocks,
            attention=attrgetter("attn"),
            mlp=attrgetter("mlp"),
            before_attention=attrgetter("norm1"),
            before_mlp=attrgetter("norm2"),
            feature_layers=(len(visual.blocks) - 1,),
            patch_size=patch,
            joins=side**2,
            restore=(visual.merger, *deepstack),
            order=_window_order(visual, side) if hasattr(visual, "fullatt_block_indexes") else None,
            windows=_windows(visual, side),
        ),
        placeholder_ids={kind: getattr(config, f"{kind}_token_id") for kind in kinds},
        encode={kind: f"get_{kind}_features" for kind in kinds},
        layouts=layouts,
        pictures=int(config.vision_config.temporal_patch_size) if "video" in kinds else 1,
        renumber=False,
        beside=("visual_pos_masks", "deepstack_visual_embeds") if deepstack else None,
        next_positions=next_positions,
        pixel_limits=("shortest_edge", "longest_edge"),
        stages=("tower", "boundary", "prefill", "decode"),
    )


def _windows(visual: Any, side: int) -> dict[int, int]:
    """Returns the patches of a window for the blocks of Qwen2.5-VL's tower that attend inside windows."""
    if not hasattr(visual, "fullatt_block_indexes"):
        return {}
    across = side * (visual.window_size // (side * visual.patch_size))
    return {i: across**2 for i in range(len(visual.blocks)) if i not in visual.fullatt_block_indexes}


def _window_order(visual: Any, side: int) -> Any:
    """Returns how the tower of Qwen2.5-VL orders its units: window by window."""

    def order(kind: Kind, arguments: Mapping[str, Any], ids: Tensor) -> Tensor:
        grids = torch.as_tensor(arguments[f"{kind}_grid_thw"])
        if hasattr(visual, "get_window_index"):  # transformers before 5.2x
            index, _ = visual.get_window_index(grids)
        else:
            from transformers.vision_utils import get_vision_window_index

            index, _ = get_vision_window_index(grids, side, visual.window_size, visual.patch_size)
        return ids[torch.as_tensor(index).cpu()]

    return order
