"""Attention that each token receives, for towers without a CLS token."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.attention_rows import attention_rows


def attention_received(
    query: Tensor,
    key: Tensor,
    real: Tensor,
    chunk: int = 128,
    scaling: float | None = None,
    *,
    bias: Tensor | None = None,
    heads: bool = False,
) -> Tensor:
    """Attention that every token gets, averaged over heads and over the real tokens that ask.

    The map is made `chunk` queries at a time and never held: memory `O(G H chunk N)`, time `O(G H N^2 d)`, no host sync.

    Args:
        query, key: `(G, N, H, d)`, as the signals `q` and `k` of a tower layer.
        real: `(G, N)` bool, tokens that ask and are asked.
        chunk: queries at a time.
        scaling: factor on the logits, the model's own; None = `d ** -0.5`.
        bias: `(G, N)`, added to the logits of each key.
        heads: keep the heads apart.

    Returns:
        `(G, N)`, or `(G, H, N)` with heads, float32 (float64 stays); rows sum to 1 over the real tokens, 0 elsewhere.
    """
    keys, scaling = key.transpose(1, 2), query.shape[-1] ** -0.5 if scaling is None else scaling
    total: Tensor | float = 0.0
    for some, asks in zip(query.transpose(1, 2).split(chunk, dim=2), real.split(chunk, dim=1), strict=True):
        rows = attention_rows(some, keys, scaling, keys=real, bias=bias)  # (G, H, chunk, N)
        rows = rows if heads else rows.mean(1, keepdim=True)
        total = total + torch.where(asks[:, None, :, None], rows, 0).sum(2)
    assert isinstance(total, Tensor)
    mean = total / real.sum(1)[:, None, None].clamp_min(1)
    return mean if heads else mean[:, 0]
