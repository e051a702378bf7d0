"""Visual towers of open_clip that are its own `VisionTransformer`; those of timm inside open_clip are found by the timm host.

Internals used: `conv1`, `transformer.{resblocks, batch_first}`, `class_embedding`, `image_size`, `patch_size`, `forward_intermediates`,
`ResidualAttentionBlock.{ln_2, ls_2}` and its `attn_mask`. Read at open_clip 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtr.hosts._dense import DenseHost, last_only
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
    )
