"""Principal components over the tokens of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.blocks import suits_cpu

RANK = 1e-12
"""Share of the largest eigenvalue below which a component is rounding."""
STRIPS, LONG = 4, 256
"""Parts that a CPU cuts a long matrix of products into, so as to leave out most of those below the diagonal; how long that is."""


def component_weights(rows: Tensor, real: Tensor, most: int) -> Tensor:
    """Returns how much each token weighs in the first principal components: absolute entries of the left singular vectors of the rows.

    Args:
        rows: `(G, N, C)`, one row per token, centred as the caller wants it; any float dtype, finite.
        real: `(G, N)` bool; what is not real weighs nothing.
        most: number of components.

    Returns:
        `(G, N, most)` float64, largest component first; components beyond the rank of the rows are zero. Exact, from the eigenvectors of the
        smaller of the Gram matrices `(N, N)` and `(C, C)`: `O(N C min(N, C) + min(N, C)^3)`; on CUDA the solver waits for the device.
    """
    wide = rows.double() * real[..., None].double()
    tall = wide.shape[1] > wide.shape[2]
    values, vectors = torch.linalg.eigh(products_above(wide.mT if tall else wide), UPLO="U")
    values, vectors = values.flip(1)[:, :most], vectors.flip(2)[..., :most]
    some = values > RANK * values[:, :1].clamp_min(1e-300)
    if tall:
        vectors = wide @ vectors / torch.where(some, values, 1).clamp_min(1e-300).sqrt()[:, None]
    weights = torch.where(some[:, None] & real[..., None], vectors.abs(), 0)
    return torch.nn.functional.pad(weights, (0, most - weights.shape[2]))


def products_above(rows: Tensor) -> Tensor:
    """Returns the products of each of `rows (G, N, C)` with itself and those behind it, `(G, N, N)`; below the diagonal anything."""
    n = rows.shape[1]
    if n < LONG or not suits_cpu(rows):
        return rows @ rows.mT
    step = -(-n // STRIPS)
    above = rows.new_zeros(len(rows), n, n)
    for start in range(0, n, step):
        above[:, start : start + step, start:] = rows[:, start : start + step] @ rows[:, start:].mT
    return above
