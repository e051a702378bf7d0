"""Statistics and choices inside the parts of a row: the views of an image, or its crops.

`part (G, N)` int64 in [0, P) names the part of each token. Memberships are `(G, P, N)` masks, so that sums run in a fixed order on every
device (a scatter would not on CUDA); P is the number of views, 1 to a few dozen. Where tokens have cells on grids, a `Board` has a row for
each view, which is P times less to look at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.ops.blocks import suits_cpu
from vtr.ops.topk import ranked, topk_mask, topk_ranked


def members(part: Tensor, real: Tensor, parts: int) -> Tensor:
    """`(G, P, N)` bool: which real tokens belong to which part."""
    if parts == 1:
        return real[:, None]
    return (part[:, None] == torch.arange(parts, device=part.device)[:, None]) & real[:, None]


def part_sum(values: Tensor, member: Tensor) -> Tensor:
    """Sum of `values (G, N)` over each part of `member (G, P, N)`: `(G, P)` in the dtype of `values`."""
    return torch.where(member, values[:, None], 0).sum(-1)


def of_part(values: Tensor, part: Tensor) -> Tensor:
    """What the part of each token has: `(G, N)` of `values (G, P)`, or `(G, 1)` where there is one part."""
    return values if values.shape[1] == 1 else values.gather(1, part)


def topk_per_part(score: Tensor, part: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """The `keep` best of every part; ties go to the lowest index. `O(N (log N + P))` per row with one sort, no host sync.

    Args:
        score: `(G, N)`, higher stays; compared in float32 at least. NaN counts as the worst.
        part: `(G, N)` int64.
        real: `(G, N)` bool, candidates.
        keep: `(G, P)` int64.

    Returns:
        Keep mask `(G, N)` bool with `min(keep, tokens of the part)` True per part.
    """
    if keep.shape[1] == 1:
        return topk_mask(score, real, keep[:, 0])
    member = members(part, real, keep.shape[1])  # (G, P, N)
    if suits_cpu(score):
        return topk_mask(score[:, None].expand_as(member).flatten(0, 1), member.flatten(0, 1), keep.flatten()).view_as(member).any(1)
    order = ranked(score).argsort(dim=1, descending=True, stable=True)
    member = member.gather(2, order[:, None].expand_as(member))  # best first
    chosen = (member & (member.cumsum(2, dtype=torch.int32) <= keep[..., None])).any(1)
    return torch.empty_like(real).scatter_(1, order, chosen)


def extent(at: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first and one past the last of `at (G, N)` among the members `(G, P, N)` of each part; 0 and 0 of an empty part."""
    some = member.any(2)
    low = torch.where(member, at[:, None], torch.iinfo(torch.int64).max).amin(2)
    high = torch.where(member, at[:, None] + 1, 0).amax(2)
    return torch.where(some, low, 0), high


class Board(NamedTuple):
    """The cells of all views `(G, V, S, S)`, on which tokens lie.

    `cell (G, N)` int64 in `0 .. V S S - 1` of each token, `V S S` of padding; `real (G, N)` bool; `views` V; `side` S, the longest of a view.
    """

    cell: Tensor
    real: Tensor
    views: int
    side: int

    def lay(self, values: Tensor, fill: float) -> Tensor:
        """Returns values `(G, N)` of tokens on their cells, `(G, V, S, S)`, with `fill` where no token lies."""
        laid = values.new_full((len(values), self.views * self.side**2 + 1), fill).scatter_(1, self.cell, values)
        return laid[:, :-1].reshape(-1, self.views, self.side, self.side)

    def topk(self, score: Tensor, keep: Tensor, most: int) -> Tensor:
        """Returns the keep mask `(G, N)` of the best of every view.

        Args:
            score: `(G, V, S, S)` as `topk_ranked` wants it.
            keep: `(G, V)` int64, at most the tokens of a view.
            most: `keep.max()` or more.
        """
        chosen = topk_ranked(score.reshape(-1, self.side**2), keep.flatten(), most)
        chosen = chosen.view(len(score), -1)
        return chosen.gather(1, self.cell.clamp_max(chosen.shape[1] - 1)) & self.real


def board(cells: Tensor, real: Tensor, views: int, side: int) -> Board:
    """Returns where tokens lie, from `cells (G, N, 3)` int64 view, row, column."""
    view, row, col = cells.unbind(-1)
    cell = torch.add(col, torch.add(row, view, alpha=side), alpha=side)
    return Board(torch.where(real, cell, views * side**2), real, views, side)
