"""Kernels of greedy selections: all picks of an image group in one launch, one program per group, its state in registers.

Rows of a matrix of pairs are read as they are needed, one per pick. Without these kernels a pick costs 4 to 12 launches of a few microseconds
each, for work that takes one. Rounding is kept as torch rounds (no fused multiply-add, division and root to nearest), so that max-min and
max-sum pick exactly what torch picks. A determinant adds products up in another order than a matrix product does: there the picks are the
same unless two candidates are equal but for rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

UNROLL: tl.constexpr = tl.constexpr(8)
"""Rows of the Cholesky factor read at a time."""


@triton.jit
def _in_turn(matrix, first, real, picks, n, most, SUM: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    live = tl.load(real + group * n + at, mask=inside, other=0) != 0
    matrix += group * n * n
    begin = 0.0 if SUM else float("inf")
    score = tl.where(live, begin, float("-inf")).to(matrix.dtype.element_ty)  # the highest is next
    pick = tl.load(first + group).to(tl.int32)
    for count in range(most):
        tl.store(picks + group * most + count, pick.to(tl.int64))
        row = tl.load(matrix + pick.to(tl.int64) * n + at, mask=inside, other=0)
        if SUM:
            score -= row
        else:
            score = tl.where(row < score, row, score)  # a NaN is not smaller
        if not REPEAT:
            score = tl.where(at == pick, float("-inf"), score)
        pick = tl.argmax(score, axis=0)  # ties: lowest index


@triton.jit
def _determinant(matrix, quality, diagonal, real, rows, order, n, most, padded, rounding, jitter, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    live = tl.load(real + group * n + at, mask=inside, other=0) != 0
    own = tl.load(quality + group * n + at, mask=inside, other=0)
    full = tl.load(diagonal + group * n + at, mask=inside, other=0)
    threshold = rounding * full
    residual = tl.where(live, full, float("-inf"))
    left = tl.where(live, own, float("-inf"))
    matrix += group * n * n
    rows += group * padded * n
    for count in range(most):
        best = tl.argmax(residual, axis=0)
        spanned = tl.max(residual, axis=0) <= tl.sum(tl.where(at == best, threshold, 0.0), axis=0)
        pick = tl.where(spanned, tl.argmax(left, axis=0), best)
        tl.store(order + group * most + count, pick.to(tl.int64))
        cosine = tl.load(matrix + pick.to(tl.int64) * n + at, mask=inside, other=0)
        row = own * cosine * tl.sum(tl.where(at == pick, own, 0.0), axis=0)
        known = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, UNROLL):  # rows not filled yet are zero
            for i in tl.static_range(UNROLL):
                earlier = rows + (start + i) * n
                known += tl.load(earlier + pick) * tl.load(earlier + at, mask=inside, other=0)
        size = tl.sum(tl.where(at == pick, residual, 0.0), axis=0)
        row = tl.div_rn(row - known, tl.sqrt_rn(tl.maximum(size, 1e-30)) + jitter)
        row = tl.where(live & (spanned == 0), row, 0.0)
        tl.store(rows + count * n + at, row, mask=inside)
        tl.debug_barrier()  # the next pick reads one entry of this row in every thread
        residual = tl.where(at == pick, float("-inf"), residual - row * row)
        left = tl.where(at == pick, float("-inf"), left)


def pick_in_turn(matrix: Tensor, first: Tensor, real: Tensor, most: int, *, total: bool, repeat: bool = False) -> Tensor:
    """Starts at `first (G,)`, then always takes the entry whose smallest value to all picked is largest, or whose sum to them is smallest.

    Args:
        matrix: `(G, N, N)` float32 or float64; row i holds the distances, or with `total` the similarities, to i.
        real: `(G, N)` bool, candidates.
        most: number of picks.
        total: sums instead of smallest values.
        repeat: a picked entry may be picked again.

    Returns:
        `(G, most)` int64 in picking order. Reads `most * N` numbers per group, no other memory, no host sync.
    """
    groups, n, _ = matrix.shape
    picks = torch.empty(groups, most, dtype=torch.int64, device=matrix.device)
    block = triton.next_power_of_2(n)
    arguments = matrix.contiguous(), first.contiguous(), real.to(torch.uint8).contiguous(), picks, n, most
    with torch.cuda.device_of(matrix):  # Triton launches on the current device
        _in_turn[(groups,)](*arguments, SUM=total, REPEAT=repeat, BLOCK=block, num_warps=_warps(block), enable_fp_fusion=False)
    return picks


def pick_determinant(cosine: Tensor, quality: Tensor, diagonal: Tensor, real: Tensor, most: int, rounding: float, jitter: float) -> Tensor:
    """All picks of `greedy_dpp`, whose arguments these are.

    Args:
        cosine: `(G, N, N)` float32.
        quality: `(G, N)` float32.
        diagonal: `(G, N)` float32, of the kernel.
        real: `(G, N)` bool, candidates.
        most: number of picks.
        rounding: share of its diagonal below which a residual is none.
        jitter: see there.

    Returns:
        `(G, most)` int64 in picking order. Reads `most^2 N / 2` numbers per group, memory `most N`, no host sync.
    """
    groups, n, _ = cosine.shape
    order = torch.empty(groups, most, dtype=torch.int64, device=cosine.device)
    padded = triton.cdiv(most, UNROLL.value) * UNROLL.value
    rows = cosine.new_zeros(groups, padded, n)
    block = triton.next_power_of_2(n)
    tensors = cosine.contiguous(), quality.contiguous(), diagonal.contiguous(), real.to(torch.uint8).contiguous(), rows, order
    with torch.cuda.device_of(cosine):  # Triton launches on the current device
        _determinant[(groups,)](*tensors, n, most, padded, rounding, jitter, BLOCK=block, num_warps=_warps(block), enable_fp_fusion=False)
    return order


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)
