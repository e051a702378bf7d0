"""Greedy MAP inference of a determinantal point process whose kernel is quality x cosine x quality."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtr.ops.blocks import suits_cpu
from vtr.ops.fused import fused
from vtr.ops.unit import Products, gram_pays, row_products, unit_rows

EXPLAINED = 2.0
"""A token whose residual is below so many roundings of its own diagonal lies in the span of the picks."""


def min_max(values: Tensor, real: Tensor, floor: float = 1e-6, ceiling: float = 0.0) -> Tensor:
    """Each row of `values (G, N)` scaled to `(v - min + floor) / (max - min + ceiling)` over its real tokens; 1 where all are equal.

    In float32 (float64 stays); 0 where not real.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    low = values.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    span = values.masked_fill(~real, -torch.inf).amax(1, keepdim=True) - low
    scaled = torch.where(span > 0, (values - low + floor) / (span + ceiling), 1.0)
    return torch.where(real, scaled, 0)


def greedy_dpp(tokens: Tensor, quality: Tensor, real: Tensor, most: int, jitter: float = 0.0) -> Tensor:
    """Order in which tokens are picked so that the determinant of `L_ij = q_i cos_ij q_j` over the picks grows most (Chen et al. 2018).

    Each pick costs one product with the picked token and one with the `(t, N)` Cholesky rows so far: `O(N (D + t))`, memory `O(G most N)`.
    The state stays on the device, without a host sync; where all cosines at once pay, all picks may run as one kernel.
    When everything left lies in the span of the picks (rank D or duplicates run out), the rest is picked by quality.

    Args:
        tokens: `(G, N, D)`, any float dtype; computed in float32 (float64 stays).
        quality: `(G, N)`, above 0.
        real: `(G, N)` bool, candidates.
        most: number of picks.
        jitter: added to the square root that a row is divided by (as some codes do).

    Returns:
        `(G, most)` int64, distinct among the real tokens as long as the row has that many; what follows is arbitrary. Ties: lowest index.
    """
    if most and len(tokens) and suits_cpu(tokens):
        return torch.stack([_of_row(*row, most, jitter) for row in zip(tokens, quality, real, strict=True)])
    unit = unit_rows(tokens, real=real)
    wide, (groups, n, _) = unit.dtype, unit.shape
    quality = torch.where(real, quality.detach().to(wide), 0)
    diagonal = quality.square() * torch.linalg.vector_norm(unit, dim=-1).square()
    gram = unit @ unit.mT if gram_pays(tokens, unit, most) else None
    rounding = EXPLAINED * torch.finfo(wide).eps
    if gram is not None and gram.dtype == torch.float32 and fused():
        from vtr.ops._triton_greedy import pick_determinant

        return pick_determinant(gram, quality, diagonal, real, most, rounding, jitter)
    if gram is not None:
        gram = gram.mul_(quality[:, None]).mul_(quality[..., None]).flatten(0, 1)  # the kernel, `(G N, N)`

    start = torch.arange(groups, device=unit.device)[:, None] * n
    threshold = rounding * diagonal
    # of each token what the picks do not explain, and what it counts once they explain all of it; -inf where it is picked
    both = torch.stack([diagonal, quality], 1).masked_fill_(~real[:, None], -torch.inf)
    residual = both[:, 0]
    rows = unit.new_zeros(groups, most, n)
    picks: list[Tensor] = []
    for count in range(most):
        best, at_best = both.max(2)  # (G, 2)
        spanned = best[:, :1] <= threshold.gather(1, at_best[:, :1])
        pick = torch.where(spanned, at_best[:, 1:], at_best[:, :1])  # (G, 1)
        picks.append(pick)
        if count + 1 == most:
            break
        at = (start + pick)[:, 0]
        if gram is not None:
            row = gram.index_select(0, at)
        else:
            row = row_products(unit, unit.flatten(0, 1).index_select(0, at)).mul_(quality).mul_(quality.gather(1, pick))
        before = rows[:, :count]
        if count:
            row -= row_products(before.mT, before.gather(2, pick[:, None].expand(-1, count, 1))[..., 0])
        root = torch.where(spanned, torch.inf, best[:, :1].sqrt())  # an empty row where all is explained
        row = torch.div(row, root + jitter if jitter else root, out=rows[:, count])
        residual.addcmul_(row, row, value=-1)
        both.scatter_(2, pick[:, None].expand(-1, 2, 1), -torch.inf)  # never twice
    return torch.cat(picks, 1) if picks else torch.zeros(groups, 0, dtype=torch.int64, device=unit.device)


def _of_row(tokens: Tensor, quality: Tensor, real: Tensor, most: int, jitter: float) -> Tensor:
    """`greedy_dpp` of one row on a CPU, where picks may be looked at: `tokens (N, D)`, `quality` and `real (N,)` -> `(most,)`."""
    unit = unit_rows(tokens, real=real)
    quality = torch.where(real, quality.detach().to(unit.dtype), 0)
    residual = quality.square() * torch.linalg.vector_norm(unit, dim=-1).square()
    threshold, factor = (EXPLAINED * torch.finfo(unit.dtype).eps * residual).tolist(), quality.tolist()
    kernel = quality[:, None] * (unit @ unit.T) * quality if gram_pays(tokens[None], unit[None], most) else None
    residual.masked_fill_(~real, -torch.inf)
    rows, picks, products = unit.new_empty(most, len(unit)), list[int](), Products(unit)
    largest = lambda: int(residual.argmax())  # noqa: E731
    while True:
        pick = largest()
        best = float(residual[pick])
        spanned = best <= threshold[pick]
        if spanned:
            pick = int(quality.masked_fill(residual == -torch.inf, -torch.inf).argmax())
        picks.append(pick)
        if len(picks) == most:
            return torch.tensor(picks)
        row, before = rows[len(picks) - 1], rows[: len(picks) - 1]
        residual[pick] = -torch.inf
        if spanned:
            row.zero_()
            continue
        if kernel is None:
            torch.mul(products.of(pick, largest), quality, out=row).mul_(factor[pick])
        else:
            row.copy_(kernel[pick])
        row.addmv_(before.T, before[:, pick], alpha=-1).div_(math.sqrt(best) + jitter)
        residual.addcmul_(row, row, value=-1)
