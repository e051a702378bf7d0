"""Choosing by score, and sharing a budget out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtr.ops.blocks import suits_cpu
from vtr.ops.fused import fused

LONGEST_COUNTED = 4096
"""Scores of a row up to which a kernel may count who is better instead of sorting."""
NO_WEIGHT = 2.0**-800
"""Stands for a weight of 0 where a budget is shared out; all others are larger."""

Known = tuple[Sequence[int], Sequence[int]]
"""Candidates of each row and how many of them stay, as Python ints, where the host knows both."""


def topk_mask(score: Tensor, real: Tensor, keep: Tensor, known: Known | None = None, most: int | None = None) -> Tensor:
    """The `keep` best of each row; ties go to the lowest index. `O(N log N)` per row, on a CPU `O(N)`, or one kernel; no host sync.

    Args:
        score: `(B, N)`, higher stays; compared in float32 at least. NaN counts as the worst.
        real: `(B, N)` bool, candidates.
        keep: `(B,)` int64.
        known: `real.sum(1)` and `keep`; where all rows are full and keep as many, nothing needs a mask.
        most: `keep.max()` or more, where the host knows no more than that.

    Returns:
        Keep mask `(B, N)` bool with `min(keep, real.sum(1))` True per row.
    """
    counts, keeps = known or ((), ())
    most, same, full = max(keeps, default=most), len({*keeps}) == 1, {*counts} == {score.shape[1]}
    on_cpu = suits_cpu(score) and score.is_floating_point()
    if most is None and on_cpu and keep.numel():
        most = int(keep.amax())
    if most and on_cpu:
        chosen, _, _ = _as_good(score if full else torch.where(real, score, -torch.inf), keep, most, same)
        if torch.equal(chosen.sum(1), keep):  # neither ties nor NaN
            return chosen
    score = ranked(score)
    if score.shape[1] <= LONGEST_COUNTED and fused():
        from vtr.ops._triton_rows import best_mask

        return best_mask(score, real, keep)
    if full:
        return topk_ranked(score, keep, most, same)
    return topk_ranked(torch.where(real, score, -torch.inf), keep, most) & real


def topk_ranked(score: Tensor, keep: Tensor, most: int | None = None, same: bool = False) -> Tensor:
    """As `topk_mask`, of scores that `ranked` returns, with -inf for what is no candidate; a row keeps `keep` entries, those without too.

    A CPU that knows `most`, which is `keep.max()` or more, does not sort: it looks for the worst that stays, and of equally bad ones the first
    stay. Where rows keep the `same`, `most` is what they keep.
    """
    if most and suits_cpu(score):
        chosen, worst, best = _as_good(score, keep, most, same)
        if torch.equal(chosen.sum(1), keep):
            return chosen
        level, room = score == worst, keep[:, None] - (best > worst).sum(1, keepdim=True)
        return (score > worst) | (level & (level.cumsum(1, dtype=torch.int32) <= room))
    best_first = score.argsort(dim=1, descending=True, stable=True)
    if most is not None and same:
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best_first[:, :most], True)
    chosen = torch.arange(score.shape[1], device=score.device) < keep[:, None]
    return torch.empty_like(score, dtype=torch.bool).scatter_(1, best_first, chosen.expand_as(score))


def _as_good(score: Tensor, keep: Tensor, most: int, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns which entries of a row are numbers above -inf and as good as the worst that stays `(B, N)`, that one's score `(B, 1)`, and the
    best scores of the row."""
    unsorted = same and len(score) > 1
    best = score.topk(min(most, score.shape[1]), sorted=not unsorted).values
    if unsorted:
        worst = best.amin(1, keepdim=True)
    else:
        worst = best[:, -1:] if same else best.gather(1, (keep[:, None] - 1).clamp(0, best.shape[1] - 1))
    return score >= worst.clamp_min(torch.finfo(score.dtype).min), worst, best


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

    While all parts fill up in proportion to their weights, part p is full at the level `capacity_p / weight_p`. It is full in the end if what
    all parts hold at that level is not above the budget; both sides are compared times `weight_p`.

    Args:
        weight: `(G, P)` float, non-negative; a part without weight takes, like the others without, what is left once all with weight are full.
        capacity: `(G, P)` int64, most that a part can take.
        total: `(G,)` int64, to be shared out; at most `capacity.sum(1)`.

    Returns:
        `(G, P)` int64 with row sums `min(total, capacity.sum(1))`; ties go to the lowest index. `O(P^2)`, no host sync.
    """
    size = capacity.double()
    weight = weight.double().clamp_min(NO_WEIGHT).masked_fill(capacity == 0, 0)
    left = torch.minimum(total, size.sum(1))[:, None]
    filled = size[..., None] * weight[:, None]  # (G, P, P): capacity of one times weight of the other
    is_open = torch.minimum(filled, filled.mT).sum(2) > left * weight

    full, active = size.masked_fill(is_open, 0), weight * is_open
    wanted = active / active.sum(1, keepdim=True).clamp_min(1e-300) * (left - full.sum(1, keepdim=True)) + full
    floor = wanted.floor()
    rest = (wanted - floor).round(decimals=9)  # rounding decides no tie
    rank = rest.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (floor + (rank < left - floor.sum(1, keepdim=True))).long()
