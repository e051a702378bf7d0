"""Euclidean and cosine distances between the tokens of a row, exact enough for ties: symmetric, zero on the diagonal and for duplicates."""

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
    return torch.where(squared <= 1e-12 * both, 0.0, squared).sqrt()  # what rounding leaves of a distance of zero


def cosine(tokens: Tensor, eps: float = 1e-6) -> Tensor:
    """`1 - x y / ((|x| + eps)(|y| + eps))` between `tokens (B, T, D)`: `(B, T, T)` float64, zero on the diagonal."""
    wide = tokens.double()
    unit = wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + eps)
    gram = unit @ unit.mT
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return (1 - (gram + gram.mT) / 2).masked_fill(itself, 0.0)
