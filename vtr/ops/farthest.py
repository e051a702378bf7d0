"""Greedy farthest-point picking (max-min diversity, Gonzalez 1985)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vtr.ops.fused import fused

Distances = Tensor | Callable[[Tensor], Tensor]
"""Distances `(G, N, N)`, or a function `index (G,) -> distances (G, N)` of one token per row to all."""
DENSE_LIMIT = 8192
"""Above this many tokens the `(N, N)` distances are computed row by row instead of kept."""


def cosine_distance_rows(tokens: Tensor, real: Tensor, dense_limit: int = DENSE_LIMIT) -> tuple[Distances, Tensor]:
    """Cosine distances `1 - cos` of every token to the others, in float32; zero vectors have distance 1 to everything.

    Args:
        tokens: `(G, N, D)`, any float dtype.
        real: `(G, N)` bool; distances to other entries are inf.
        dense_limit: N above which rows are computed when asked for.

    Returns:
        The distances, and `(G, N)` the distance of each token to its nearest other token, -inf where not real. `O(N^2 D)` once.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    n = tokens.shape[1]
    if n <= dense_limit:
        distance = (1 - unit @ unit.mT).masked_fill(~real[:, None], torch.inf)  # (G, N, N)
        return distance, _second_smallest(distance).masked_fill(~real, -torch.inf)

    def row(index: Tensor) -> Tensor:
        group = torch.arange(len(index), device=index.device)
        return (1 - (unit @ unit[group, index, :, None]).squeeze(-1)).masked_fill(~real, torch.inf)

    size = max(1, dense_limit * dense_limit // n)  # as much memory at a time as the dense form takes at its limit
    parts = [
        _second_smallest((1 - unit[:, start : start + size] @ unit.mT).masked_fill(~real[:, None], torch.inf))
        for start in range(0, n, size)
    ]
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
    picks = torch.zeros(len(first), most, dtype=torch.int64, device=first.device)
    pick = first
    for count in range(most):
        picks[:, count] = pick
        row = distances[group, pick] if isinstance(distances, Tensor) else distances(pick)
        to_picked = torch.fmin(to_picked, row)  # fmin: a NaN distance never frees a picked token
        if not repeat:
            to_picked[group, pick] = -torch.inf
        pick = to_picked.argmax(1)
    return picks


def _second_smallest(distance: Tensor) -> Tensor:
    """The smallest is the token itself."""
    return distance.topk(min(2, distance.shape[-1]), largest=False).values[..., -1]
