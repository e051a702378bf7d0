"""LLaVA-OneVision and LLaVA-NeXT-Video on Hugging Face transformers: AnyRes images. Videos are refused.

Internals used: those of `hf_llava` for LLaVA-NeXT, and `config.vision_aspect_ratio` with its form `anyres_max_9`. Read at transformers 5.24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.hosts._host import Host
from vtr.hosts.hf_llava import anyres_host, llava_next
from vtr.registry import register_host

SLACK = 1.1**2
"""By how much the tokens of a canvas may exceed the limit before the family interpolates."""


@register_host("llava_next_video")
def llava_next_video(model: Any) -> Host:
    """Images as in LLaVA-NeXT."""
    return llava_next(model)


@register_host("llava_onevision")
def llava_onevision(model: Any) -> Host:
    """Thumbnail and canvas as in LLaVA-NeXT; the canvas of a large image is interpolated, and its tower can then neither be read nor cut.

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

    return anyres_host(model, packed, crops, SLACK * int(usual.removeprefix("anyres_max_")))
