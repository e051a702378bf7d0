"""Choosing by score, and sharing a budget out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtr.ops.fused import fused

LONGEST_COUNTED = 4096
"""Scores of a row up to which a kernel may count who is better instead of sorting."""


Known = tuple[Sequence[int], Sequence[int]]
"""Candidates of each row and how many of them stay, as Python ints, where the host knows both."""


def topk_mask(score: Tensor, real: Tensor, keep: Tensor, known: Known | None = None) -> Tensor:
    """The `keep` best of each row; ties go to the lowest index. `O(N log N)` per row, or one kernel; no host sync.

    Args:
        score: `(B, N)`, higher stays; compared in float32 at least. NaN counts as the worst.
        real: `(B, N)` bool, candidates.
        keep: `(B,)` int64.
        known: `real.sum(1)` and `keep`; where all rows are full and keep as many, nothing needs a mask.

    Returns:
        Keep mask `(B, N)` bool with `min(keep, real.sum(1))` True per row.
    """
    score = ranked(score)
    if score.shape[1] <= LONGEST_COUNTED and fused():
        from vtr.ops._triton_rows import best_mask

        return best_mask(score, real, keep)
    if known is not None and set(known[0]) == {score.shape[1]} and len(set(known[1])) == 1:
        best = score.argsort(dim=1, descending=True, stable=True)[:, : known[1][0]]
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(1, best, True)
    best_first = torch.where(real, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(score.shape[1], device=score.device) < keep[:, None]
    return torch.empty_like(real).scatter_(1, best_first, chosen.expand_as(real)) & real


def ranked(score: Tensor) -> Tensor:
    """Returns scores of any shape as they are compared: in float32 at least, NaN and -inf as the lowest number, so that -inf is free for others."""
    score = score if score.dtype == torch.float64 else score.float()
    lowest = torch.finfo(score.dtype).min
    return score.nan_to_num(lowest, torch.inf, lowest)


def best_of_groups(score: Tensor, real: Tensor, group: Tensor, limit: Tensor) -> Tensor:
    """Returns the best entries of every group of a row, as many as the group's limit; ties go to the lowest index.

    Args:
        score: `(B, N)`, higher is better.
        real: `(B, N)` bool, candidates.
        group: `(B, N)` int64 in `0 .. S - 1`.
        limit: `(B, S)` int64.

    Returns:
        Mask `(B, N)` bool. Two sorts, no host sync.
    """
    own = torch.where(real, group, limit.shape[1])
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, own.gather(1, order).argsort(dim=1, stable=True))
    size = torch.zeros(len(own), limit.shape[1] + 1, dtype=torch.int64, device=own.device).scatter_add_(1, own, torch.ones_like(own))
    place = torch.arange(own.shape[1], device=own.device) - (size.cumsum(1) - size).gather(1, own.gather(1, order))
    rank = torch.empty_like(order).scatter_(1, order, place)
    return real & (rank < limit.gather(1, group.clamp(0, limit.shape[1] - 1)))


def quota(weight: Tensor, capacity: Tensor, total: Tensor) -> Tensor:
    """Shares a budget over parts by largest remainder, never above a part's capacity; what a full part cannot take goes to the others.

    Parts are looked at in the order in which they fill up, so that one pass finds all full ones.

    Args:
        weight: `(G, P)` float, non-negative; a part without weight takes, like the others without, what is left once all with weight are full.
        capacity: `(G, P)` int64, most that a part can take.
        total: `(G,)` int64, to be shared out; at most `capacity.sum(1)`.

    Returns:
        `(G, P)` int64 with row sums `min(total, capacity.sum(1))`; ties go to the lowest index. `O(P log P)`, no host sync.
    """
    weight = torch.where(capacity > 0, weight.double().clamp_min(0), 0)
    last = weight == 0
    weight = torch.where(last, (capacity > 0).double(), weight)
    left = torch.minimum(total, capacity.sum(1))[:, None]

    order = capacity.argsort(dim=1, stable=True)  # among equals below, and of those without weight
    fills_at = torch.where(last, torch.inf, capacity / weight)
    order = order.gather(1, fills_at.gather(1, order).argsort(dim=1, stable=True))
    size, own, behind = (values.gather(1, order) for values in (capacity, weight, last))
    others = torch.where(behind, _from_here(own * behind), _from_here(own * ~behind))
    is_full = size * others <= own * (left - size.cumsum(1) + size)
    full = torch.zeros_like(last).scatter_(1, order, is_full.cummin(1).values)

    share = torch.where(full, capacity, 0)
    left = left - share.sum(1, keepdim=True)
    first = torch.where(full | last, 0, weight)
    active = torch.where(first.sum(1, keepdim=True) > 0, first, torch.where(full, 0, weight))
    wanted = active / active.sum(1, keepdim=True).clamp_min(1e-300) * left
    room = capacity - share
    floor = torch.minimum(wanted.floor().long(), room)
    remainder = torch.where(room > floor, (wanted - floor).round(decimals=9), -1.0)  # rounding decides no tie
    by_rest = remainder.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(by_rest).scatter_(1, by_rest, torch.arange(by_rest.shape[1], device=by_rest.device).expand_as(by_rest))
    return share + floor + ((rank < left - floor.sum(1, keepdim=True)) & (remainder >= 0))


def _from_here(values: Tensor) -> Tensor:
    """Sum of each entry and those after it in its row."""
    return values.flip(1).cumsum(1).flip(1)
