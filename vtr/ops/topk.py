"""Choosing by score, and sharing a budget out."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask(score: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """The `keep` best of each row; ties go to the lowest index. `O(N log N)` per row, no host sync.

    Args:
        score: `(B, N)`, higher stays; compared in float32 at least. NaN counts as the worst.
        real: `(B, N)` bool, candidates.
        keep: `(B,)` int64.

    Returns:
        Keep mask `(B, N)` bool with `min(keep, real.sum(1))` True per row.
    """
    score = score if score.dtype == torch.float64 else score.float()
    score = score.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    by_score = score.argsort(dim=1, descending=True, stable=True)
    candidates_first = by_score.gather(1, (~real).gather(1, by_score).to(torch.uint8).argsort(dim=1, stable=True))
    rank = torch.empty_like(by_score).scatter_(1, candidates_first, torch.arange(score.shape[1], device=score.device).expand_as(by_score))
    return (rank < keep[:, None]) & real


def quota(weight: Tensor, capacity: Tensor, total: Tensor) -> Tensor:
    """Shares a budget over parts by largest remainder, never above a part's capacity; what a full part cannot take goes to the others.

    Args:
        weight: `(G, P)` float, non-negative; all-zero rows count as equal weights over parts with capacity.
        capacity: `(G, P)` int64, most that a part can take.
        total: `(G,)` int64, to be shared out; at most `capacity.sum(1)`.

    Returns:
        `(G, P)` int64 with row sums `min(total, capacity.sum(1))`; ties go to the lowest index. At most P rounds, no host sync.
    """
    weight = weight.double().clamp_min(0) * (capacity > 0)
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, (capacity > 0).double())
    left = torch.minimum(total, capacity.sum(1))
    share = torch.zeros_like(capacity)
    for _ in range(capacity.shape[1]):  # every round fills at least one part or hands everything out
        room = capacity - share
        active = weight * (room > 0)
        active = torch.where(active.sum(1, keepdim=True) > 0, active, (room > 0).double())
        wanted = active / active.sum(1, keepdim=True).clamp_min(1e-300) * left[:, None]
        over = wanted >= room
        fill = torch.where(over.any(1, keepdim=True), torch.where(over, room, 0), 0)
        share = share + torch.where(room > 0, fill, 0)
        left = left - fill.sum(1)
    room = capacity - share
    active = weight * (room > 0)
    active = torch.where(active.sum(1, keepdim=True) > 0, active, (room > 0).double())
    wanted = active / active.sum(1, keepdim=True).clamp_min(1e-300) * left[:, None]
    floor = torch.minimum(wanted.floor().long(), room)
    remainder = torch.where(room > floor, wanted - floor, -1.0)
    order = remainder.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return share + floor + ((rank < (left - floor.sum(1))[:, None]) & (remainder >= 0))
