"""A few rows of an attention map, next to whatever kernel computes the attention itself."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.blocks import suits_cpu
from vtr.ops.precision import outside_autocast

FEW = 8
"""Rows of a key head up to which keys that lie head by head in memory are read as they are, at the price of as many products as heads."""


@outside_autocast
def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    *,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    since: Tensor | None = None,
    bias: Tensor | None = None,
    softmax: bool = True,
) -> Tensor:
    """Attention weights of the given queries over all keys, in float32 (float64 stays).

    Args:
        query: `(B, H, R, d)`, the rows wanted, after the rotary embedding.
        key: `(B, H or H / groups, K, d)`; grouped-query heads are matched without repeating keys.
        scaling: factor on the logits, usually `d ** -0.5`.
        keys: `(B, K)` bool, keys that exist; None = all.
        positions: `(B, R)` int64, key column of each query: columns after it are hidden (causal); None = not causal.
        since: `(B, R)` int64, first key column that each query sees (sliding windows); None = from the start.
        bias: `(B, K)` float added to the logits of each key.
        softmax: False returns masked logits (`-inf` where hidden).

    Returns:
        `(B, H, R, K)`; a row without any visible key is all zero. Time and memory `O(B H R K)`.
    """
    batch, heads, rows, width = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = (query.to(dtype) * scaling).reshape(batch, key.shape[1], -1, width)  # query heads of one key head side by side
    logits = products(grouped, key.to(dtype)).reshape(batch, heads, rows, key.shape[2])
    if bias is not None:
        logits = logits + bias[:, None, None].to(dtype)
    hidden = None if keys is None else ~keys[:, None, None]
    if positions is not None:
        later = torch.arange(key.shape[2], device=key.device) > positions[:, None, :, None]
        hidden = later if hidden is None else hidden | later
    if since is not None:
        earlier = torch.arange(key.shape[2], device=key.device) < since[:, None, :, None]
        hidden = earlier if hidden is None else hidden | earlier
    if hidden is not None:
        logits.masked_fill_(hidden, -torch.inf)
    if not softmax:
        return logits
    weights = logits.softmax(-1)
    return weights if keys is None else weights.nan_to_num(0.0)  # a causal query sees itself at least


def products(rows: Tensor, keys: Tensor) -> Tensor:
    """Returns `rows @ keys.mT` of every head, without copying keys that lie token by token in memory, all heads of a token side by side.

    A batched product needs one step from matrix to matrix; such keys have two, from head to head and from one row of the batch to the next, and
    matmul would copy them. So a CPU gets one row of the batch at a time, which its cache wants anyway; elsewhere a few rows are multiplied with
    all heads at once: `(K, H d)` by a matrix `(H d, H R)` that is zero between different heads.

    Args:
        rows: `(B, H, R, d)`.
        keys: `(B, H, K, d)`, of the same dtype.

    Returns:
        `(B, H, R, K)`.
    """
    by_token = keys.stride(3) == 1 and keys.stride(1) == rows.shape[3] and keys.shape[1] > 1
    return _side_by_side(rows, keys) if by_token else rows @ keys.mT


def _side_by_side(rows: Tensor, keys: Tensor) -> Tensor:
    batch, heads, number, width = rows.shape
    if batch > 1 and suits_cpu(rows):
        return torch.cat([own @ part.mT for own, part in zip(rows.split(1), keys.split(1), strict=True)])
    if batch == 1 or number > FEW:
        return rows @ keys.mT
    apart = torch.eye(heads, dtype=rows.dtype, device=rows.device)[:, None, :, None]
    block = (rows.mT[:, :, :, None] * apart).reshape(batch, heads * width, heads * number)
    return (keys.transpose(1, 2).flatten(2) @ block).view(batch, -1, heads, number).permute(0, 2, 3, 1)
