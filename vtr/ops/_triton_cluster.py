"""Kernels of windowed clustering: two launches an iteration take the place of a dozen, and no box of centres is copied.

The first gives every token of a tile its shares in the tile's box of centres; the second makes every centre the mean of the tokens that share
in it, tile by tile in a fixed order, so that sums are always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _shares(
    tokens, centres, index, place, bias, real, sharp, share, area, clusters, width, tiles, n, m,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row, col = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    mine, box = row < n, col < m
    token = batch * area + tl.load(index + tile * n + row, mask=mine, other=0)
    centre = batch * clusters + tl.load(place + tile * m + col, mask=box, other=0)
    product = tl.zeros([ROWS, COLS], tl.float32)
    norm = tl.zeros([COLS], tl.float32)
    for start in range(0, width, CHUNK):
        at = start + tl.arange(0, CHUNK)
        x = tl.load(tokens + token[:, None] * width + at[None, :], mask=mine[:, None] & (at < width)[None, :], other=0)
        c = tl.load(centres + centre[:, None] * width + at[None, :], mask=box[:, None] & (at < width)[None, :], other=0)
        product += tl.dot(x.to(tl.float32), tl.trans(c), input_precision="ieee")
        norm += tl.sum(c * c, axis=1)
    near = tl.load(bias + (tile * n + row[:, None]) * m + col[None, :], mask=mine[:, None] & box[None, :], other=0)
    logit = tl.load(sharp + batch) * (2 * product - norm[None, :]) + near
    logit = tl.where(box[None, :], logit, float("-inf"))
    power = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    counts = tl.load(real + tile * n + row, mask=mine, other=0)  # 0 for a token that is another tile's
    found = power / tl.sum(power, axis=1)[:, None] * counts[:, None]
    tl.store(share + ((batch * tiles + tile) * n + row[:, None]) * m + col[None, :], found, mask=mine[:, None] & box[None, :])


@triton.jit
def _means(tokens, index, share, holder, centres, area, clusters, width, tiles, n, m, most, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    centre, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    summed = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    for k in range(most):
        where = tl.load(holder + centre * most + k)
        tile, slot, last = where // m, where % m, tl.where(where >= 0, n, 0)
        for start in range(0, n, ROWS):
            row = start + tl.arange(0, ROWS)
            mine = row < last
            token = batch * area + tl.load(index + tile * n + row, mask=mine, other=0)
            part = tl.load(share + ((batch * tiles + tile) * n + row) * m + slot, mask=mine, other=0)
            x = tl.load(tokens + token[:, None] * width + at[None, :], mask=mine[:, None] & (at < width)[None, :], other=0)
            summed += tl.sum(part[:, None] * x.to(tl.float32), axis=0)
            weights += part
    mean = summed / tl.maximum(tl.sum(weights, axis=0), 1e-16)
    tl.store(centres + (batch * clusters + centre) * width + at, mean, mask=at < width)


def clustered(
    tokens: Tensor,
    centres: Tensor,
    index: Tensor,
    place: Tensor,
    bias: Tensor,
    real: Tensor,
    holder: Tensor,
    sharp: Tensor,
    iterations: int,
) -> Tensor:
    """`iterations` rounds of `cluster` on tiles.

    Args:
        tokens: `(B, N, D)` of any float dtype; sums are in float32.
        centres: `(B, M, D)` float32, where they start.
        index, place, bias, real, holder: `tokens`, `centres`, `bias`, `real` and `holders` of `Tiles`, `real (T, n)` float32.
        sharp: `(B,)` float32.
        iterations: at least 1.

    Returns:
        Centres `(B, M, D)` float32.
    """
    (batch, area, width), (tiles, n), m = tokens.shape, index.shape, place.shape[1]
    cols = max(triton.next_power_of_2(m), 16)
    rows = min(max(triton.next_power_of_2(n), 16), 64 if cols <= 128 else 16)
    share = torch.empty(batch, tiles, n, m, dtype=torch.float32, device=tokens.device)
    tokens, centres, sharp = tokens.contiguous(), centres.contiguous(), sharp.contiguous()
    buffers = torch.empty(2, *centres.shape, device=centres.device)  # the first centres may be the tokens themselves
    shape = area, centres.shape[1], width, tiles, n, m
    block = min(triton.next_power_of_2(width), 128)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        for round_ in range(iterations):
            found = buffers[round_ % 2]
            _shares[(tiles, triton.cdiv(n, rows), batch)](
                tokens, centres, index, place, bias, real, sharp, share, *shape, ROWS=rows, COLS=cols, CHUNK=32
            )
            _means[(centres.shape[1], triton.cdiv(width, block), batch)](
                tokens, index, share, holder, found, *shape, holder.shape[1], ROWS=32, BLOCK=block
            )
            centres = found
    return centres
