"""Merging one token after the other into those that stay, each time half and half."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vtr.ops.gather import left_align, take

CHUNK = 2**24
"""Similarities that are held at a time."""


def nearest_kept(tokens: Tensor, real: Tensor, keep: Tensor, most: int) -> Tensor:
    """Finds for every token the kept one that is most similar to it.

    Args:
        tokens: `(G, N, D)`; cosines in float32 at least.
        real, keep: `(G, N)` bool; a row that keeps nothing has no answer.
        most: the largest number that a row keeps, a Python int.

    Returns:
        `(G, N)` int64 into N; kept tokens name themselves, ties go to the lowest index. `O(N most D)`, memory `CHUNK` numbers at a time.
    """
    index, there = left_align(keep, most)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    pivots = F.normalize(take(tokens, index).to(wide), dim=-1)
    step = max(1, CHUNK // max(1, len(tokens) * most))
    found = []
    for some in tokens.split(step, dim=1):
        similarity = F.normalize(some.to(wide), dim=-1) @ pivots.mT
        found.append(similarity.masked_fill(~there[:, None], -torch.inf).argmax(2))
    nearest = index.gather(1, torch.cat(found, 1))
    return torch.where(keep, torch.arange(keep.shape[1], device=keep.device), nearest)


def merge_by_halves(tokens: Tensor, real: Tensor, keep: Tensor, into: Tensor) -> Tensor:
    """Merges every token that is not kept into its pivot, in ascending order: each time the pivot becomes the mean of itself and the token.

    After m merges a pivot is `h / 2^m` plus the sum of `x_j / 2^(m - j + 1)`, so that nothing here has to wait for the merge before.

    Args:
        tokens: `(G, N, D)`.
        real, keep: `(G, N)` bool.
        into: `(G, N)` int64 pivots, kept tokens.

    Returns:
        `(G, N, D)` in the dtype of the tokens; what nothing was merged into is unchanged. Sums in float64, `O(N D)`.
    """
    merged = real & ~keep
    spot = torch.where(merged, into, keep.shape[1])
    order = spot.argsort(dim=1, stable=True)
    count = torch.zeros(len(spot), spot.shape[1] + 1, dtype=torch.int64, device=spot.device).scatter_add_(1, spot, torch.ones_like(spot))
    place = torch.arange(spot.shape[1], device=spot.device).expand_as(order)
    first = (count.cumsum(1) - count).gather(1, spot.gather(1, order))
    turn = torch.zeros_like(order).scatter_(1, order, place - first)  # of a token among those of its pivot, from 0
    weight = torch.where(merged, torch.exp2((turn - count.gather(1, spot)).double()), 0.0)
    share = torch.exp2(-count[:, :-1].double())
    total = tokens.double() * share[..., None]
    total.scatter_add_(1, into[..., None].expand_as(total), tokens.double() * weight[..., None])
    return torch.where((keep & (count[:, :-1] > 0))[..., None], total.to(tokens.dtype), tokens)
