"""How redundant a token is among the others, from the graph of its similarities (Script's graph module)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Rows of the similarity matrix at a time."""


def graph_redundancy(tokens: Tensor, real: Tensor, threshold: float = 0.2, least: int = 4, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Score and degree of every token in the graph of tokens with cosine of at least `threshold`, itself included.

    With degree d and mean similarity mu of the neighbours the score is `a = d exp(gamma (mu - threshold))`; a token with fewer than `least`
    neighbours has the mean of `a` and its mean similarity to all.

    Args:
        tokens: `(G, N, D)`, any float dtype; computed in float32 (float64 stays).
        real: `(G, N)` bool.

    Returns:
        Score `(G, N)`, higher is more redundant, and degree `(G, N)` int64. `O(N^2 D)`, at most 1024 x N similarities at a time.
    """
    unit = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1, eps=1e-12)
    count = real.sum(1, keepdim=True).clamp_min(1)
    scores, degrees = [], []
    for part in unit.split(CHUNK, 1):
        similarity = part @ unit.mT  # (G, chunk, N)
        near = (similarity >= threshold) & real[:, None]
        degree = near.sum(2)
        mean = torch.where(near, similarity, 0).sum(2) / degree.clamp_min(1)
        dense = degree * (gamma * (mean - threshold)).exp()
        overall = torch.where(real[:, None], similarity, 0).sum(2) / count
        scores.append(torch.where(degree >= least, dense, 0.5 * dense + 0.5 * overall))
        degrees.append(degree)
    return torch.cat(scores, 1), torch.cat(degrees, 1)
