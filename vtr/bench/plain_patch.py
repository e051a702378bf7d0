"""Plain reference: a ViT of timm whose blocks merge tokens, as one would patch it from the ToMe paper (Bolya et al., arXiv 2210.09461, Section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtr.bench.plain_inside import tome


@contextmanager
def merging(model: Any, counts: Sequence[int]) -> Iterator[None]:
    """Inside the block every layer of the model merges, between its attention and its MLP.

    Args:
        model: a `timm.models.vision_transformer.VisionTransformer` with one prefix token, in evaluation.
        counts: tokens that go in each block; at most half of those it gets.
    """
    size: list[Tensor] = []

    def forward_of(block: Any, remove: int) -> Any:
        def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            attended, metric = _attention(block.attn, block.norm1(x), size[0])
            x = x + block.drop_path1(block.ls1(attended))
            if remove:
                x, size[0], _ = tome(x, metric, size[0], remove)
            return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

        return forward

    def begin(_module: nn.Module, args: tuple) -> None:
        size[:] = [torch.ones(*args[0].shape[:2], 1, dtype=args[0].dtype, device=args[0].device)]

    handle = model.blocks[0].register_forward_pre_hook(begin)
    try:
        for block, remove in zip(model.blocks, counts, strict=True):
            block.forward = forward_of(block, remove)
        yield
    finally:
        handle.remove()
        for block in model.blocks:
            block.__dict__.pop("forward", None)


def _attention(module: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Proportional attention over `x (B, T, D)` with `log(size (B, T, 1))` on the logits of keys; and the keys `(B, T, d)`, mean over heads."""
    query, key, value = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query * module.scale @ key.mT + size.log()[:, None, None, :, 0]).softmax(-1)
    return module.proj((weights @ value).transpose(1, 2).flatten(2)), key.mean(1)
