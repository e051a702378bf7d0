"""A few rows of an attention map, next to whatever kernel computes the attention itself."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.precision import outside_autocast


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
    grouped = query.to(dtype).reshape(batch, key.shape[1], -1, width)  # query heads of one key head side by side
    logits = (grouped @ key.to(dtype).mT * scaling).view(batch, heads, rows, key.shape[2])
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
        logits = logits.masked_fill(hidden, -torch.inf)
    if not softmax:
        return logits
    weights = logits.softmax(-1)
    return weights if hidden is None else weights.nan_to_num(0.0)
