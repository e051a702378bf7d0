"""Density peak clustering with k nearest neighbours (DPC-kNN, Rodriguez and Laio 2014, Du et al. 2016)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.ops.distances import euclidean, rounded
from vtr.ops.gather import group_sums


class Peaks(NamedTuple):
    """`center (B, C)` int64 into T, best score first, and `real (B, C)`; `cluster (B, T)` int64, number of the cluster, -1 where not real."""

    center: Tensor
    real: Tensor
    cluster: Tensor


def density_peaks(
    tokens: Tensor, real: Tensor, clusters: Tensor, most: int, neighbours: Tensor | None = None, noise: Tensor | None = None
) -> Peaks:
    """Clusters around tokens that are dense and far from anything denser.

    Distances are Euclidean over sqrt(D). Density is exp(-mean squared distance to the k nearest tokens), itself one of them; the score is
    density times the distance to the nearest denser token, of the densest one the largest distance of all. The best-scored tokens are
    centers; every token joins its nearest center, the first on ties. Equal densities: the lower index counts as denser.

    Args:
        tokens: `(B, T, D)`, any float dtype; computed in float64.
        real: `(B, T)` bool.
        clusters: `(B,)` int64, at most the real tokens of the row.
        most: the most of them as a Python int.
        neighbours: `(B,)` int64, k; default `clusters`.
        noise: `(B, T)` added to the density (as some codes do against ties).

    Returns:
        `Peaks`. Time `O(T^2 D)`, memory `O(T^2)`, no host sync.
    """
    distance = euclidean(tokens) / tokens.shape[2] ** 0.5
    return peaks_among(distance, real, clusters, most, clusters if neighbours is None else neighbours, noise)


def peaks_among(distance: Tensor, real: Tensor, clusters: Tensor, most: int, neighbours: Tensor, noise: Tensor | None = None) -> Peaks:
    """Clusters tokens by their distances `(B, T, T)` float64; everything else is as for `density_peaks`."""
    width = real.shape[1]
    most = min(most, width)
    score, distance = scores_among(distance, real, neighbours, noise)
    order = torch.arange(width, device=real.device)
    center = score.argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, C)
    taken = order[:most] < clusters[:, None]
    to_center = distance.gather(2, center[:, None].expand(-1, width, -1)).masked_fill(~taken[:, None], torch.inf)
    cluster = to_center.argmin(2)
    spot = torch.where(taken, center, width)  # a center belongs to itself
    own = order[:most].expand_as(center)
    cluster = torch.cat([cluster, cluster[:, :1]], 1).scatter(1, spot, own)[:, :width]
    return Peaks(center, taken, torch.where(real, cluster, -1))


def peak_scores(tokens: Tensor, real: Tensor, neighbours: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns how good a centre each token makes, and the distances between tokens.

    Args:
        tokens, real, neighbours, noise: as for `density_peaks`.

    Returns:
        Score `(B, T)` float64, -inf where not real, and distance `(B, T, T)` float64, inf for pairs that are not real.
    """
    return scores_among(euclidean(tokens) / tokens.shape[2] ** 0.5, real, neighbours, noise)


def scores_among(distance: Tensor, real: Tensor, neighbours: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Does what `peak_scores` does, by the distances `(B, T, T)` float64 of tokens."""
    pair = real[:, :, None] & real[:, None]
    distance = distance.masked_fill(~pair, torch.inf)
    order = torch.arange(real.shape[1], device=real.device)
    near = (order < neighbours[:, None])[:, None]
    squared = torch.where(near, distance.sort(dim=2).values.square(), 0).sum(2) / neighbours.clamp_min(1)[:, None]
    density = rounded((-squared).exp())
    if noise is not None:
        density = density + noise
    denser = (density[:, None] > density[:, :, None]) | ((density[:, None] == density[:, :, None]) & (order < order[:, None]))
    farthest = torch.where(pair, distance, 0).amax((1, 2), keepdim=True)
    apart = torch.where(denser & pair, distance, torch.inf).amin(2)
    apart = torch.where(apart.isinf(), farthest[..., 0], apart)
    return (apart * density).masked_fill(~real, -torch.inf), distance


def cluster_means(tokens: Tensor, cluster: Tensor, clusters: int, eps: float = 0.0) -> Tensor:
    """Mean of each cluster `(B, C, D)` float64: sum over `count + eps`, 0 where a cluster is empty. `tokens (B, T, D)`, `cluster (B, T)`."""
    total, number = group_sums(tokens.double(), cluster, clusters)
    return torch.where(number[..., None] > 0, total / (number[..., None] + eps).clamp_min(1e-300), 0.0)
