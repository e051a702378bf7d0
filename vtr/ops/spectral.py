"""Spectral embedding of tokens by the normalised Laplacian of their neighbourhood graph."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.distances import euclidean

BEHIND = 10.0
"""Eigenvalue given to what is not real, above all others (these are at most 2)."""


def heat_affinity(tokens: Tensor, real: Tensor, sigma: float = 2.0, neighbours: Tensor | None = None) -> Tensor:
    """`exp(-|x - y|^2 / (2 sigma^2))` between `tokens (B, n, D)`: `(B, n, n)` float64, 0 where not `real (B, n)`.

    With `neighbours (B,)` int64 only entries stay that are among the largest so many of their row or of their column, the token itself included;
    ties stay.
    """
    pair = real[:, :, None] & real[:, None]
    affinity = torch.where(pair, (-euclidean(tokens).square() / (2 * sigma**2)).exp(), 0)
    if neighbours is None:
        return affinity
    place = (neighbours - 1).clamp_max(tokens.shape[1] - 1)[:, None, None].expand(-1, tokens.shape[1], 1)
    bound = affinity.sort(dim=2, descending=True).values.gather(2, place)
    near = affinity >= bound
    return torch.where(near | near.mT, affinity, 0)


def laplacian_eigen(affinity: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `(B, n)` ascending and eigenvectors `(B, n, n)` as columns of `D^-1/2 (D - W) D^-1/2`; what is not real comes last.

    `O(n^3)` in float64; on CUDA the solver waits for the device.
    """
    degree = affinity.sum(2)
    scale = torch.where(degree > 0, degree.clamp_min(1e-300).rsqrt(), 0)
    itself = torch.eye(affinity.shape[1], dtype=torch.bool, device=affinity.device)
    laplacian = scale[:, :, None] * (torch.diag_embed(degree) - affinity) * scale[:, None]
    laplacian = torch.where(itself & ~real[:, None], BEHIND, laplacian)
    values, vectors = torch.linalg.eigh((laplacian + laplacian.mT) / 2)
    return values, vectors
