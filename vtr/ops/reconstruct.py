"""From refined centres back to the full grid of tokens: each token becomes a weighted mean of the centres it was nearest to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vtr.ops.precision import outside_autocast

Normalize = Literal["sum", "l2"]
FEW = 8
"""From this many centres for each neighbour on, taking the neighbours alone is much cheaper than a product with the weights of all."""


@outside_autocast
def reconstruction(tokens: Tensor, centres: Tensor, *, tau: float | Tensor, neighbours: int = 20, normalize: Normalize = "sum") -> Tensor:
    """Weights of the centres in every token (arXiv 2210.01035, token reconstruction layer); the same for every layer restored.

    Args:
        tokens: `(B, N, D)` before clustering, any float dtype; distances are in float32 at least.
        centres: `(B, M, D)` right after clustering.
        tau: sharpness, a number or one per row `(B,)`.
        neighbours: centres with the largest weights that count; ties with the last of them count too. Any of M or more, or below 0, is all.
        normalize: weights of a token sum to 1, or have Euclidean norm 1 as in all the released code.

    Returns:
        `(B, N, M)`, at least 0, float32 (float64 for float64 tokens): the softmax of -tau times the squared distance, cut off. `O(N M D)`.

    Raises:
        ValueError: neighbours is 0, or an unknown `normalize`.
    """
    if neighbours == 0:
        raise ValueError("reconstruction: neighbours must be at least 1, or negative for all centres, got 0")
    if normalize not in ("sum", "l2"):
        raise ValueError(f"reconstruction: normalize must be 'sum' or 'l2', got {normalize!r}")
    away = _away(tokens, centres, tau)
    if 0 < neighbours < centres.shape[1]:
        last = away.topk(neighbours, dim=-1, largest=False, sorted=False).values.amax(-1, keepdim=True)
        away = torch.where(away > last, torch.inf, away)
    weights = (-away).softmax(-1)  # the row maximum is subtracted: no row is all zero
    return weights if normalize == "sum" else weights / torch.linalg.vector_norm(weights, dim=-1, keepdim=True)


def are_few(neighbours: int, centres: int) -> bool:
    """Tells whether `nearest` is to be taken instead of `reconstruction`.

    Not in attention windows, whose padding makes many centres the same: there all ties have to count.
    """
    return 0 < FEW * neighbours <= centres


@outside_autocast
def nearest(tokens: Tensor, centres: Tensor, *, tau: float | Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Returns the nearest centres of every token, `(B, N, neighbours)` int64, and their weights, which sum to 1.

    The same as `reconstruction`, whose arguments these are, but where centres tie for the last place only as many count as there is room for.
    """
    away, index = _away(tokens, centres, tau).topk(neighbours, dim=-1, largest=False, sorted=False)
    return index, (-away).softmax(-1)


def mean_of_nearest(index: Tensor, weights: Tensor, refined: Tensor) -> Tensor:
    """Returns `(B, N, D)` in the dtype of `refined (B, M, D)`: its mean by what `nearest` gives, at a cost of `O(N neighbours D)`."""
    batch, count, width = refined.shape
    place = (index + count * torch.arange(batch, device=index.device)[:, None, None]).flatten(0, 1)
    weights = weights.to(refined.dtype).flatten(0, 1)
    return F.embedding_bag(place, refined.reshape(-1, width), per_sample_weights=weights, mode="sum").unflatten(0, (batch, -1))


def _away(tokens: Tensor, centres: Tensor, tau: float | Tensor) -> Tensor:
    """Returns tau times the squared distances `(B, N, M)` less the token's own square, which is the same for all centres."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    centres = centres.to(wide.dtype)
    sharp = tau if isinstance(tau, (int, float)) else tau.to(wide).view(-1, 1, 1)
    return torch.baddbmm((sharp * centres.square().sum(-1, keepdim=True)).mT, wide, (-2 * sharp * centres).mT)


def reconstruct(weights: Tensor, refined: Tensor) -> Tensor:
    """`(B, N, D)` in the dtype of `refined (B, M, D)`: its mean by `weights (B, N, M)`. Products in that dtype, sums in float32."""
    return weights.to(refined.dtype) @ refined
