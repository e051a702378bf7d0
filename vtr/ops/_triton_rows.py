"""Kernels that choose by score and merge: each takes the place of a dozen small launches, or of float64 copies of all tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _best(score, real, keep, mask, n, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    score += group * n
    real += group * n
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(score + at, mask=at < n, other=0)
    better = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        other = start + tl.arange(0, BLOCK)
        live = tl.load(real + other, mask=other < n, other=0) != 0
        theirs = tl.load(score + other, mask=other < n, other=0)
        earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < at[:, None])
        ahead = live[None, :] & ((theirs[None, :] > mine[:, None]) | earlier)
        better += tl.sum(ahead.to(tl.int32), axis=1)
    live = tl.load(real + at, mask=at < n, other=0) != 0
    tl.store(mask + group * n + at, ((better < tl.load(keep + group)) & live).to(tl.uint8), mask=at < n)


@triton.jit
def _merge(tokens, size, assign, merged, sizes, n, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    me = tl.program_id(0).to(tl.int64)
    base = me // n * n
    own = (me % n).to(tl.int32)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    count = 0
    total = tl.sum(tl.zeros([CHUNK], tl.float64), axis=0)
    summed = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, CHUNK):
        place = start + tl.arange(0, CHUNK)
        hit = tl.load(assign + base + place, mask=place < n, other=-1) == own
        total += tl.sum(tl.load(size + base + place, mask=hit, other=0).to(tl.float64), axis=0)
        found = tl.sum(hit.to(tl.int32), axis=0)
        count += found
        while found > 0:  # in ascending order, so that sums are always the same
            source = tl.min(tl.where(hit, place, n), axis=0)
            weight = tl.load(size + base + source).to(tl.float64)
            value = tl.load(tokens + (base + source) * width + column, mask=there, other=0)
            summed += value.to(tl.float64) * weight
            hit = hit & (place != source)
            found -= 1
    mean = summed / tl.maximum(total, 1e-12)
    itself = tl.load(tokens + me * width + column, mask=there, other=0)
    value = tl.where(count > 1, mean, itself.to(tl.float64))
    if merged.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)  # as torch rounds to half
    tl.store(merged + me * width + column, value.to(merged.dtype.element_ty), mask=there)
    if tl.program_id(1) == 0:
        tl.store(sizes + me, tl.where(count > 1, total.to(tl.float32), tl.load(size + me)))


def best_mask(score: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """`topk_mask`: counts for each entry the real ones in front of it, `O(N^2)` comparisons in registers.

    `score (B, N)` float32 or float64 without NaN, `real (B, N)` bool, `keep (B,)` int64; returns `(B, N)` bool.
    """
    rows, n = score.shape
    mask = torch.empty(rows, n, dtype=torch.uint8, device=score.device)
    tensors = score.contiguous(), real.to(torch.uint8).contiguous(), keep.contiguous(), mask
    with torch.cuda.device_of(score):  # Triton launches on the current device
        _best[(rows, triton.cdiv(n, 64))](*tensors, n, BLOCK=64)
    return mask.bool()


def merged_tokens(tokens: Tensor, size: Tensor, assign: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_tokens` without float64 copies: one program per token adds up what was merged into it, `O(N^2)` comparisons.

    `tokens (B, N, D)`, `size (B, N)` float32, `assign (B, N)` int64; returns tokens in their dtype and sizes `(B, N)` float32.
    """
    rows, n, width = tokens.shape
    merged = torch.empty(rows, n, width, dtype=tokens.dtype, device=tokens.device)
    sizes = torch.empty(rows, n, dtype=torch.float32, device=tokens.device)
    block = min(triton.next_power_of_2(width), 1024)
    grid = rows * n, triton.cdiv(width, block)
    tensors = tokens.contiguous(), size.float().contiguous(), assign.contiguous(), merged, sizes
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        _merge[grid](*tensors, n, width, CHUNK=min(triton.next_power_of_2(n), 1024), BLOCK=block, enable_fp_fusion=False)
    return merged, sizes
