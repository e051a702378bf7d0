"""Visual towers of open_clip that are its own `VisionTransformer`; those of timm inside open_clip are found by the timm host.

Internals used: `conv1`, `transformer.{resblocks, batch_first}`, `class_embedding`, `image_size`, `patch_size`, `forward_intermediates`,
`ResidualAttentionBlock.{ln_1, ln_2, ls_2}`, and its `attn`, a torch `MultiheadAttention` whose keys are projected once more for merging.
Read at open_clip 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vtr.hosts._dense import DenseHost, MergePoint, last_only
from vtr.registry import register_host
from vtr.types import VtrError


@register_host("open_clip:VisionTransformer")
def open_clip_vit(model: Any) -> DenseHost:
    """A CLIP tower: one CLS token, absolute positions added before the first block."""
    if not model.transformer.batch_first:
        raise VtrError(
            "open_clip:VisionTransformer: batch_first=False puts tokens on the first dimension; build the model with batch_first=True"
        )

    def read(arguments: Mapping[str, Any]) -> Sequence[int]:
        indices, count = arguments.get("indices"), len(model.transformer.resblocks)
        if indices is None or isinstance(indices, int):
            return range(count - (count if indices is None else indices), count)
        return [i % count for i in indices]

    rows, cols = (size // patch for size, patch in zip(model.image_size, model.patch_size, strict=True))
    return DenseHost(
        name="open_clip:VisionTransformer",
        model=model,
        blocks=model.transformer.resblocks,
        patches=model.conv1,
        prefix_tokens=1,
        has_cls=True,
        patch_grid=(rows, cols),
        entries={"forward": last_only, "forward_intermediates": read},
        merge_point=MergePoint(
            keys=lambda block: block.ln_1,
            norm=lambda block: block.ln_2,
            branch=lambda block: block.ls_2,
            mask="key_padding_mask",
            heads=model.transformer.resblocks[0].attn.num_heads,
            project=_keys,
            attention=lambda block: block.attn,
        )
        if all(type(block).__name__ == "ResidualAttentionBlock" for block in model.transformer.resblocks)
        else None,
    )


def _keys(block: Any, normed: Tensor) -> Tensor:
    """Keys `(B, S, D)` that the attention makes of its input: torch's attention shows none."""
    width, attention = normed.shape[-1], block.attn
    bias = attention.in_proj_bias
    return F.linear(normed, attention.in_proj_weight[width : 2 * width], None if bias is None else bias[width : 2 * width])
