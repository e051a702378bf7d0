"""Plain ViTs of timm: `VisionTransformer` and its kin (DeiT, DINOv2, registers, CLIP and SigLIP towers), and `Eva` with rotary positions.

Internals used: `patch_embed.{proj, grid_size}`, `blocks`, `num_prefix_tokens`, `cls_token`, `dynamic_img_size`, `forward_intermediates`,
`Block.{norm2, drop_path2, attn.k_norm}` and its `attn_mask`, the keyword `rope` of Eva's blocks. Read at timm 1.0.28.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtr.hosts._dense import DenseHost, MergePoint, Taps, last_only
from vtr.registry import register_host
from vtr.types import VtrError

BLOCKS = ("Block", "ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock", "EvaBlock", "EvaBlockPostNorm")
"""Blocks whose only dependence on the number of tokens is in what they are given."""


@register_host("timm:VisionTransformer", "timm:Eva")
def timm_vit(model: Any) -> DenseHost:
    """A plain ViT; absolute positions are added before the first block, rotary ones come with every call of a block."""
    kind = type(model).__name__
    embed = model.patch_embed
    if not hasattr(embed, "proj") or getattr(embed, "grid_size", None) is None:
        raise VtrError(f"timm:{kind}: its {type(embed).__name__} shows no token grid; use a model with a convolutional patch embedding")
    odd = {type(block).__name__ for block in model.blocks} - set(BLOCKS)
    if odd:
        raise VtrError(
            f"timm:{kind}: blocks of type {', '.join(sorted(odd))} are not known to run on fewer tokens; known: {', '.join(BLOCKS)}"
        )

    first = model.blocks[0]
    mergeable = all(type(block).__name__ == "Block" and hasattr(block.attn, "k_norm") for block in model.blocks)
    return DenseHost(
        name=f"timm:{kind}",
        model=model,
        blocks=model.blocks,
        patches=embed.proj,
        prefix_tokens=int(model.num_prefix_tokens),
        has_cls=getattr(model, "cls_token", None) is not None,
        patch_grid=(int(embed.grid_size[0]), int(embed.grid_size[1])),
        dynamic=bool(getattr(model, "dynamic_img_size", False)),
        entries=entries(model),
        rotary="rope" if getattr(model, "rope", None) is not None else "",
        merge_point=MergePoint(
            keys=lambda block: block.attn.k_norm,
            norm=lambda block: block.norm2,
            branch=lambda block: block.drop_path2,
            mask="attn_mask",
        )
        if mergeable and hasattr(first, "drop_path2")
        else None,
    )


def entries(model: Any) -> dict[str, Taps]:
    """The methods of a ViT of timm that run its blocks, and which blocks they read."""
    from timm.models._features import feature_take_indices

    def read(arguments: Mapping[str, Any]) -> Sequence[int]:
        return feature_take_indices(len(model.blocks), arguments.get("indices"))[0]

    return {"forward": last_only, "forward_features": last_only, "forward_intermediates": read}
