"""LLaVA-OneVision and LLaVA-NeXT-Video on Hugging Face transformers: AnyRes images, and videos whose frames are pooled.

Internals used: those of `hf_llava` for LLaVA-NeXT, and `config.vision_aspect_ratio` with its form `anyres_max_9`; for videos `apply_pooling`,
which comes behind the projector, or `vision_resampler` in front of it, with `config.{spatial_pool_mode, spatial_pool_stride}`. Read at
transformers 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vtr.hosts._layout import Kind, Layout
from vtr.hosts._protocol import Host
from vtr.hosts._towers import Pooling
from vtr.hosts.hf_llava import anyres_host, llava_next
from vtr.registry import register_host

SLACK = 1.1**2
"""By how much the tokens of a canvas may exceed the limit before the family interpolates."""


@register_host("llava_next_video")
def llava_next_video(model: Any) -> Host:
    """Images as in LLaVA-NeXT; every frame of a video is one view without newlines, pooled in front of the projector."""
    host, config = llava_next(model), model.config
    stride, (rows, cols) = int(config.spatial_pool_stride), host.tower.patch_grid or (0, 0)
    resampler = host.base.vision_resampler

    def tokens(features: Tensor) -> Tensor:
        if config.spatial_pool_mode != "conv":
            return resampler(features)
        spread = rearrange(features, "v (r c) d -> v d r c", r=rows)  # a convolution has weights for features only
        return rearrange(F.avg_pool2d(spread, stride), "v d r c -> v (r c) d")

    return with_videos(host, Pooling(tokens, (rows // stride, cols // stride), behind_projector=False))


@register_host("llava_onevision")
def llava_onevision(model: Any) -> Host:
    """Thumbnail and canvas as in LLaVA-NeXT; the canvas of a large image is interpolated, and its tower can then neither be read nor cut.
    Every frame of a video is one view, interpolated behind the projector to half as many rows and columns; one newline ends the video.

    An image beside others in its prompt has one view, closed by one newline token, where the processor says so.
    """
    base, usual = getattr(model, "model", model), model.config.vision_aspect_ratio

    def packed(features: Tensor, size: Tensor, newline: Tensor, arguments: dict[str, Any]) -> Tensor:
        ratio = arguments.get("vision_aspect_ratio") or usual
        return base.pack_image_features([features], size, image_newline=newline, vision_aspect_ratio=ratio)[0][0]

    def crops(arguments: dict[str, Any]) -> list[bool]:
        counts = arguments.get("batch_num_images")
        if counts is None:
            return [True] * len(arguments["image_sizes"])
        return [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]

    host = anyres_host(model, packed, crops, SLACK * int(usual.removeprefix("anyres_max_")))
    rows, cols = host.tower.patch_grid or (0, 0)
    pooling = Pooling(lambda features: base.apply_pooling(features), ((rows + 1) // 2, (cols + 1) // 2), behind_projector=True)
    return with_videos(host, pooling, newline=True)


def with_videos(host: Host, pooling: Pooling, newline: bool = False) -> Host:
    """Returns a host of images that takes videos, too.

    Args:
        host: of images.
        pooling: how patches of a frame become tokens.
        newline: one newline token ends a video.
    """

    def layouts(kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        if kind == "image":
            return host.layouts(kind, arguments)
        pixels = arguments["pixel_values_videos" if "pixel_values_videos" in arguments else "pixel_values"]
        videos, frames = pixels.shape[:2]
        patch = torch.arange(frames * pooling.grid[0] * pooling.grid[1])
        line = torch.full_like(patch, -1)
        if newline:
            patch, line = F.pad(patch, (0, 1), value=-1), torch.zeros(len(patch) + 1, dtype=torch.int64)
        return [Layout((pooling.grid,) * frames, patch, line, kind="video")] * videos

    ids = {**host.placeholder_ids, "video": host.model.config.video_token_id}
    encode: dict[Kind, str] = {**host.encode, "video": "get_video_features"}
    return replace(host, layouts=layouts, pooling=pooling, encode=encode, placeholder_ids=ids)
