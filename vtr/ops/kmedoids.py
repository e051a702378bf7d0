"""k-medoids with a deterministic farthest-point start (KKZ), from a matrix of distances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.ops.farthest import farthest_first


class Medoids(NamedTuple):
    """`medoid (B, C)` int64, ascending, `real (B, C)`; `cluster (B, n)` int64, place in `medoid` of each token's; `start (B, C)`, as picked first."""

    medoid: Tensor
    real: Tensor
    cluster: Tensor
    start: Tensor


def kmedoids(distance: Tensor, norm: Tensor, real: Tensor, clusters: Tensor, most: int, iterations: int = 100) -> Medoids:
    """Alternates between joining the nearest medoid and moving each medoid to the member with the smallest sum of distances to its cluster.

    The start is the token of largest norm, then always the one farthest from all picked. A medoid belongs to itself; ties go to the first medoid
    in the current order, and to the member of lowest index. A row whose medoids do not move any more stays as it is.

    Args:
        distance: `(B, n, n)`, symmetric, 0 on the diagonal.
        norm: `(B, n)`, of which the largest starts.
        real: `(B, n)` bool.
        clusters: `(B,)` int64, at most the real tokens of a row; 0 is allowed.
        most: the most of them as a Python int.
        iterations: how many times at most.

    Returns:
        `Medoids`; the assignment is made once more after sorting. Time `O(iterations n^2)`, memory `O(n^2)`, no host sync.
    """
    n = distance.shape[1]
    taken = torch.arange(most, device=distance.device) < clusters[:, None]  # (B, C)
    pair = real[:, :, None] & real[:, None]
    first = norm.masked_fill(~real, -torch.inf).argmax(1)
    start = farthest_first(first, distance, real, most)
    distance = distance.masked_fill(~pair, 0)
    medoid = start
    numbers = torch.arange(most, device=distance.device)[:, None]
    for _ in range(iterations):
        cluster = _nearest(distance, medoid, taken)
        together = (cluster[:, :, None] == cluster[:, None]) & pair
        cost = torch.where(together, distance, 0).sum(2)  # (B, n)
        member = (cluster[:, None] == numbers) & real[:, None]  # (B, C, n)
        moved = torch.where(member, cost[:, None], torch.inf).argmin(2)
        medoid = torch.where(taken & member.any(2), moved, medoid)
    medoid = torch.where(taken, medoid, n).sort(1).values
    return Medoids(medoid.clamp_max(n - 1), taken, _nearest(distance, medoid.clamp_max(n - 1), taken), start)


def _nearest(distance: Tensor, medoid: Tensor, taken: Tensor) -> Tensor:
    """Number of the nearest medoid `(B, n)`; a medoid is its own."""
    n = distance.shape[1]
    to = distance.gather(2, medoid[:, None].expand(-1, n, -1)).masked_fill(~taken[:, None], torch.inf)
    itself = (medoid[:, None] == torch.arange(n, device=medoid.device)[:, None]) & taken[:, None]
    return to.masked_fill(itself, -1.0).argmin(2)
