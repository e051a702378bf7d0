"""Real architectures of a given size with random weights, so that times can be measured without a download."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Shape(NamedTuple):
    """Sizes of a LLaVA-style model: `(width, MLP width, layers, heads)` of tower and LLM, and the image."""

    tower: tuple[int, int, int, int]
    llm: tuple[int, int, int, int]
    image: int = 336
    patch: int = 14
    text: int = 75


MID = Shape(tower=(512, 2048, 24, 8), llm=(1024, 2816, 12, 16))
"""`llava-mid`: a tower as deep as CLIP-L and an LLM that a laptop can run."""
TINY = Shape(tower=(32, 64, 4, 4), llm=(64, 128, 4, 4), image=48, patch=8, text=12)
SHAPES = {"llava-mid": MID, "llava-tiny": TINY}


def build(
    shape: Shape, anyres: bool, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model of that shape and one prompt for it.

    Args:
        shape: sizes.
        anyres: LLaVA-NeXT with a 2 x 2 grid of crops instead of LLaVA-1.5.
        dtype, device: of weights and pixels.
        seed: of weights and pixels.

    Returns:
        The model in eval mode on SDPA, and inputs of batch 1: system text, one image, a question.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tower = CLIPVisionConfig(image_size=shape.image, patch_size=shape.patch, **dict(zip(keys, shape.tower, strict=True)))
    llm = LlamaConfig(vocab_size=1000, max_position_embeddings=8192, **dict(zip(keys, shape.llm, strict=True)))
    common = {"vision_config": tower, "text_config": llm, "image_token_id": 999}
    torch.manual_seed(seed)
    side = shape.image // shape.patch
    if anyres:
        model: Any = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=[[2 * shape.image] * 2], **common))
        count, pixels = 5 * side**2 + 2 * side, torch.randn(1, 5, 3, shape.image, shape.image)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**common))
        count, pixels = side**2, torch.randn(1, 3, shape.image, shape.image)
    model = model.eval().to(device, dtype)
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([[5] * (shape.text // 2) + [999] * count + [7] * (shape.text - shape.text // 2)], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(device, dtype)}
    if anyres:
        inputs["image_sizes"] = torch.tensor([[2 * shape.image] * 2], device=device)
    return model, inputs
