"""Greedy coverage (facility location): pick after pick, the column that raises the maxima of the rows most."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.blocks import in_blocks


@in_blocks
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
