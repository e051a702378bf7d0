"""Rows of images as rows of their parts (views), so that a method may treat every part alike, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.ops.gather import take
from vtr.ops.parts import members
from vtr.ops.topk import quota


class Parts(NamedTuple):
    """`token (G, P, W)` int64 into N, `real (G, P, W)` bool, tokens of each part in their order; `keep (G, P)` int64, its share of the budget."""

    token: Tensor
    real: Tensor
    keep: Tensor


def split(part: Tensor, real: Tensor, keep: Tensor, parts: int, width: int) -> Parts:
    """Sorts tokens by part and shares a budget out: equally, by largest remainder, no part above what it has.

    Args:
        part: `(G, N)` int64 in [0, P).
        real: `(G, N)` bool.
        keep: `(G,)` int64.
        parts: P.
        width: an upper bound of the tokens of a part.

    `O(N log N + P N)`, no host sync.
    """
    order = torch.where(real, part, parts).argsort(dim=1, stable=True)
    size = members(part, real, parts).sum(-1)
    place = (size.cumsum(1) - size)[..., None] + torch.arange(width, device=part.device)  # (G, P, W)
    there = torch.arange(width, device=part.device) < size[..., None]
    index = order.gather(1, place.clamp_max(real.shape[1] - 1).flatten(1)).view_as(place)
    return Parts(index, there, quota(torch.ones_like(size, dtype=torch.float64), size, keep))


def gather_parts(values: Tensor, parts: Parts) -> Tensor:
    """`values (G, N, ...)` of each part: `(G * P, W, ...)`."""
    return take(values, parts.token.flatten(1)).unflatten(1, parts.token.shape[1:]).flatten(0, 1)


def join_mask(mask: Tensor, parts: Parts, n: int) -> Tensor:
    """A mask over the tokens of parts `(G * P, W)` as one over tokens `(G, n)`."""
    chosen = mask.view(parts.token.shape) & parts.real
    spot = torch.where(chosen, parts.token, n).flatten(1)
    out = torch.zeros(len(spot), n + 1, dtype=torch.bool, device=mask.device)
    return out.scatter_(1, spot, True)[:, :n]
