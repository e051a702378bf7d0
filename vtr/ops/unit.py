"""Tokens as vectors of length 1, and the cosines of some of them to all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vtr.ops.blocks import CACHE, suits_cpu
from vtr.ops.precision import widened

LARGE = 1 << 16
"""Numbers of a matrix from which on a product with a vector is bound by reading it."""


def unit_rows(tokens: Tensor, eps: float = 1e-12, real: Tensor | None = None) -> Tensor:
    """Returns `tokens (..., D)` divided by their lengths, in float32 (float64 stays), without a gradient.

    One with NaN or inf becomes zero, and so does one that is not `real (...)`.
    """
    wide = widened(tokens.detach())
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(eps)
    finite = suits_cpu(wide) and math.isfinite(length.sum())
    if real is not None:
        length.masked_fill_(~real[..., None], torch.inf)
    unit = wide / length
    return unit if finite else unit.nan_to_num_()


def gram_pays(tokens: Tensor, wide: Tensor, most: int) -> bool:
    """Whether all products of `wide (G, N, D)` at once, `(G, N, N)`, serve a choice of `most` tokens better than those of each pick.

    They must fit under the activations of a layer for tokens of that dtype, about 12 D values per token: residual, norm, q, k, v, and the three of
    the MLP. A processor needs as long for them as for the products of N / 7 picks (measured; float32, 576 and 2880 tokens 1024 wide).
    """
    n, width = wide.shape[1:]
    fits = (n + width) * wide.element_size() <= 12 * width * tokens.element_size()
    return fits and (not suits_cpu(wide) or 7 * most >= n)


def row_products(wide: Tensor, vector: Tensor) -> Tensor:
    """Returns the products `(G, N)` of `wide (G, N, D)` with `vector (G, D)`.

    It rounds alike in batches of any size. A processor multiplies large matrices with a vector faster than with a matrix of one row; on a GPU
    one row is another kernel than the same row in a batch, so that there are two equal ones.
    """
    on_cpu = suits_cpu(wide)
    if on_cpu and wide[0].numel() >= LARGE:
        made = [wide[group].mv(vector[group]) for group in range(len(wide))]
        return made[0][None] if len(made) == 1 else torch.stack(made)
    return torch.bmm(vector[:, None].expand(-1, 1 if on_cpu else 2, -1), wide.mT)[:, 0]


class Products:
    """Products of all rows of a matrix with one after the other, on a CPU.

    Where the matrix does not stay in the cache, two products take as long as one, since all of it has to be fetched: there a row has beside it
    the one that would come next if nothing changed, which often enough comes next, or later.

    Args:
        wide: `(N, D)`.
    """

    def __init__(self, wide: Tensor) -> None:
        self.wide, self._known = wide, dict[int, Tensor]()
        self._fetched = wide.numel() * wide.element_size() > CACHE

    def of(self, row: int, guess: Callable[[], int]) -> Tensor:
        """Returns the products `(N,)` with a row; `guess` says which may be next."""
        if not self._fetched:
            return self.wide.mv(self.wide[row])
        if row not in self._known:
            pair = [row, guess()]
            self._known |= zip(pair, self.wide[pair] @ self.wide.T, strict=True)
        return self._known.pop(row)
