"""Greedy farthest-point picking (max-min diversity, Gonzalez 1985)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtr.ops.fused import fused
from vtr.ops.unit import unit_rows

Distances = Tensor | Callable[[Tensor], Tensor]
"""Distances `(G, N, N)`, or a function `index (G,) -> distances (G, N)` of one token per row to all."""
DENSE_LIMIT = 8192
"""Above this many tokens the `(N, N)` distances are computed row by row instead of kept."""


def cosine_distance_rows(tokens: Tensor, real: Tensor, dense_limit: int = DENSE_LIMIT) -> tuple[Distances, Tensor]:
    """Cosine distances `1 - cos` of every token to the others, in float32; zero vectors have distance 1 to everything, and so have those with NaN.

    Args:
        tokens: `(G, N, D)`, any float dtype.
        real: `(G, N)` bool; distances to other entries are inf.
        dense_limit: N above which rows are computed when asked for.

    Returns:
        The distances, and `(G, N)` the distance of each token to its nearest other token, -inf where not real. `O(N^2 D)` once.
    """
    unit = unit_rows(tokens.float())
    n = tokens.shape[1]
    if n <= dense_limit:
        distance = _distance(unit @ unit.mT, real)  # (G, N, N)
        return distance, _nearest_other(distance).masked_fill(~real, -torch.inf)

    def row(index: Tensor) -> Tensor:
        group = torch.arange(len(index), device=index.device)
        return (1 - (unit @ unit[group, index, :, None]).squeeze(-1)).masked_fill(~real, torch.inf)

    size = max(1, dense_limit * dense_limit // n)  # as much memory at a time as the dense form takes at its limit
    parts = [_nearest_other(_distance(unit[:, start : start + size] @ unit.mT, real), start) for start in range(0, n, size)]
    return row, torch.cat(parts, 1).masked_fill(~real, -torch.inf)


def farthest_first(first: Tensor, distances: Distances, real: Tensor, most: int, repeat: bool = False) -> Tensor:
    """Picks tokens so that each is as far as possible from all picked before it; ties go to the lowest index.

    Args:
        first: `(G,)` int64, the first pick of each row.
        distances: of all pairs or row by row; all at once may run as one kernel.
        real: `(G, N)` bool, candidates.
        most: how many to pick. A row with fewer candidates is filled with meaningless picks at the end.
        repeat: True lets a picked token be picked again (as authors' codes do when only duplicates are left).

    Returns:
        Picks `(G, most)` int64 in picking order. `O(most N)` on top of the distances, on the device, without a sync.
    """
    if isinstance(distances, Tensor) and fused():
        from vtr.ops._triton_greedy import pick_in_turn

        return pick_in_turn(distances, first, real, most, total=False, repeat=repeat)
    group = torch.arange(len(first), device=first.device)
    to_picked = torch.full(real.shape, torch.inf, device=real.device).masked_fill(~real, -torch.inf)
    if most == 0:
        return torch.zeros(len(first), 0, dtype=torch.int64, device=first.device)
    picks = [first]
    for _ in range(most - 1):
        row = distances[group, picks[-1]] if isinstance(distances, Tensor) else distances(picks[-1])
        to_picked = torch.fmin(to_picked, row)  # fmin: a NaN distance never frees a picked token
        if not repeat:
            to_picked.scatter_(1, picks[-1][:, None], -torch.inf)
        picks.append(to_picked.argmax(1))
    return torch.stack(picks, 1)


def _distance(cosine: Tensor, real: Tensor) -> Tensor:
    """`1 - cosine (G, R, N)` in place, inf to what is not `real (G, N)`."""
    return cosine.neg_().add_(1).masked_fill_(~real[:, None], torch.inf)


def _nearest_other(distance: Tensor, start: int = 0) -> Tensor:
    """The smallest distance of each row of `(G, R, N)`, the tokens from `start` on, to another token; inf where there is none."""
    itself = distance.diagonal(offset=start, dim1=1, dim2=2)
    own = itself.clone()
    itself.fill_(torch.inf)
    nearest = distance.amin(2)
    itself.copy_(own)
    return nearest
