"""Euclidean and cosine distances between the tokens of a row, exact enough for ties: symmetric, zero on the diagonal, the same for duplicates."""

from __future__ import annotations

import torch
from torch import Tensor


def euclidean(tokens: Tensor) -> Tensor:
    """Distances `(B, T, T)` float64 between `tokens (B, T, D)` of any float dtype; `O(T^2 D)` by one Gram matrix in float64."""
    wide = tokens.double()
    return of_products(wide @ wide.mT)


def of_products(gram: Tensor) -> Tensor:
    """Euclidean distances `(B, T, T)` float64 between tokens whose products with each other are `gram (B, T, T)` float64."""
    gram = (gram + gram.mT) / 2
    norm = gram.diagonal(dim1=1, dim2=2)
    both = norm[:, :, None] + norm[:, None]
    squared = both - 2 * gram
    squared = torch.where(squared <= 1e-12 * both, 0.0, squared)  # what rounding leaves of a distance of zero
    return rounded(squared).sqrt()  # duplicates are as far from everything


def rounded(values: Tensor) -> Tensor:
    """Returns float64 values to 27 binary digits, so that what differs by a rounding alone is the same."""
    wide = values * (2.0**26 + 1)
    return wide - (wide - values)


def cosine(tokens: Tensor, eps: float = 1e-6) -> Tensor:
    """`1 - x y / ((|x| + eps)(|y| + eps))` between `tokens (B, T, D)`, to 9 decimals: `(B, T, T)` float64, zero for parallel tokens."""
    wide = tokens.double()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    unit, share = wide / (length + eps), length / (length + eps)
    gram, parallel = unit @ unit.mT, share @ share.mT
    gram = (gram + gram.mT) / 2
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    same = itself | ((gram >= parallel - 1e-9) & (parallel > 0))
    return (1 - gram.round(decimals=9)).masked_fill(same, 0.0)
