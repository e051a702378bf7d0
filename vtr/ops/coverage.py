"""Greedy coverage (facility location): pick after pick, the column that raises the maxima of the rows most."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.blocks import suits_cpu

AT_ONCE = 16
"""Columns whose scores a CPU brings up to date at a time."""


def greedy_coverage(
    matrix: Tensor,
    real: Tensor,
    most: int,
    *,
    weight: Tensor | None = None,
    bonus: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the columns in the order in which they are picked, and the score of each pick.

    A row is covered as well as its largest entry among the picked columns, 0 at the start. The gain of a column is what all rows together would be
    covered better with it; its score is `gain * weight + bonus`. The state is the running maximum `(G, R)` of every row; a pick makes one pass over
    the matrix in a buffer of its size, so memory is twice the matrix whatever the number of picks.

    Args:
        matrix: `(G, R, N)`, rows to be covered by columns, float32 or float64; rows that count for nothing are zero.
        real: `(G, N)` bool, columns that may be picked.
        most: number of picks, a Python int.
        weight: `(G, N)`, non-negative; None for 1.
        bonus: `(G, N)`; None for 0.
        first: `(G, N)` bool, columns that are picked before all others; None for all alike.

    Returns:
        Picks `(G, most)` int64, distinct among the real columns as long as the row has that many (what follows is arbitrary), and their scores
        `(G, most)`. Ties: lowest index. `O(most R N)`, without a host sync.
    """
    matrix = matrix.detach()
    groups, rows, _ = matrix.shape
    if most and groups and suits_cpu(matrix):
        given = ([None] * len(matrix) if part is None else part for part in (weight, bonus, first))
        found = [_of_row(most, *row) for row in zip(matrix, ~real, *given, strict=True)]
        return tuple(map(torch.stack, zip(*found, strict=True)))  # type: ignore[return-value]
    group = torch.arange(groups, device=matrix.device)
    picks, scores = [], []
    covered, buffer, closed = matrix.new_zeros(groups, rows), torch.empty_like(matrix), ~real
    for _ in range(most):
        score = torch.sub(matrix, covered[..., None], out=buffer).clamp_(min=0).sum(1)
        score = score if weight is None else score * weight
        score = score if bonus is None else score + bonus
        refused = closed
        if first is not None:
            now = first & ~closed
            refused = torch.where(now.any(1, keepdim=True), ~now, closed)
        best = score.masked_fill(refused, -torch.inf).max(1)
        picks.append(best.indices)
        scores.append(best.values)
        closed.scatter_(1, best.indices[:, None], True)
        covered = torch.maximum(covered, matrix[group, :, best.indices])
    if not picks:
        return torch.zeros(groups, 0, dtype=torch.int64, device=matrix.device), matrix.new_zeros(groups, 0)
    return torch.stack(picks, 1), torch.stack(scores, 1)


def _of_row(
    most: int, matrix: Tensor, closed: Tensor, weight: Tensor | None, bonus: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`greedy_coverage` of one row on a CPU, where scores may be looked at (Minoux 1978).

    Scores only fall, so that old ones are bounds: a few columns with the best are computed anew, and if the best of these is above the bounds of
    all others it is the pick. Sums of floats in one order fall, too, so that nothing is lost to rounding.
    """
    columns = matrix.T.contiguous()
    covered = columns.new_zeros(len(matrix))

    def scored(at: Tensor | slice) -> Tensor:
        gain = (columns[at] - covered).clamp_min_(0).sum(1)
        gain = gain if weight is None else gain * weight[at]
        return gain if bonus is None else gain + bonus[at]

    picks, scores, count = list[int](), list[float](), min(AT_ONCE, len(columns))
    bound, waiting = scored(slice(None)), None if first is None else first & ~closed
    while len(picks) < most:
        refused = closed if waiting is None or not waiting.any() else ~waiting
        highest, at = bound.masked_fill(refused, -torch.inf).topk(count)
        fresh = scored(at)
        bound[at] = fresh
        best = fresh.masked_fill_(refused[at], -torch.inf).max()
        if best > highest[-1]:
            pick = at[fresh == best].min()
        else:
            bound = scored(slice(None))
            pick = bound.masked_fill(refused, -torch.inf).argmax()
        picks.append(int(pick))
        scores.append(float(bound[pick]))
        closed[pick] = True
        if waiting is not None:
            waiting[pick] = False
        torch.maximum(covered, columns[picks[-1]], out=covered)
    return torch.tensor(picks), torch.tensor(scores, dtype=matrix.dtype)
