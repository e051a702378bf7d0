"""Quantiles and the inter-quartile rule on rows of different length."""

from __future__ import annotations

import torch
from torch import Tensor


def quantile(values: Tensor, real: Tensor, q: float) -> Tensor:
    """The `q`-quantile of each row, linear between neighbours (numpy's default), in float64.

    Args:
        values: `(G, N)`.
        real: `(G, N)` bool, entries that count.
        q: 0 to 1.

    Returns:
        `(G,)`; inf for a row without entries. `O(N log N)`, no host sync.
    """
    ordered = values.double().masked_fill(~real, torch.inf).sort(dim=1).values
    count = real.sum(1)
    place = q * (count - 1).clamp_min(0).double()
    below = place.floor().long()
    low = ordered.gather(1, below[:, None])[:, 0]
    high = ordered.gather(1, torch.minimum(below + 1, (count - 1).clamp_min(0))[:, None])[:, 0]
    return torch.where(count > 0, low + (high - low) * (place - below), torch.inf)


def upper_fence(values: Tensor, real: Tensor, factor: float = 1.5) -> Tensor:
    """`Q3 + factor (Q3 - Q1)` of each row: what lies strictly above is an outlier. Arguments and cost as for `quantile`."""
    first, third = quantile(values, real, 0.25), quantile(values, real, 0.75)
    return torch.where(third.isinf(), third, third + factor * (third - first))
