"""Soft k-means of a grid of tokens onto a smaller grid of centres, where a token may only join the centres near its own cell.

Each token sees at most `window^2` centres. The grid of tokens is cut into tiles; a tile's tokens are compared with the box of centres that
any of them may join, so that the work is a few small matrix products instead of one of all tokens with all centres.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vtr.ops.fused import fused
from vtr.ops.precision import outside_autocast

Grid = tuple[int, int]
Made = TypeVar("Made")
GATHER = 96
"""What fetching and adding back one number of a box of centres costs, in multiply-adds; decides how large tiles are, not what comes out."""


def constant(make: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator: keeps what was made for the last 32 shapes, also in compiled code, where it becomes part of the graph."""
    kept = lru_cache(maxsize=32)(make)

    @wraps(make)
    def known(*shapes: Any) -> Made:
        return kept(*shapes)

    known._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, but that imports the compiler
    return known


@outside_autocast
def cluster(tokens: Tensor, grid: Grid, clusters: Grid, *, tau: float | Tensor, iterations: int = 5, window: int = 5) -> Tensor:
    """Centres of a token grid (arXiv 2210.01035, token clustering layer).

    1. A centre starts as the mean of its cell (adaptive average pooling).
    2. A token belongs to the centres whose cell is at most `window // 2` cells from its own, in rows and in columns, by the softmax over
       those centres of -tau times the squared Euclidean distance.
    3. A centre becomes the mean of the original tokens, weighted by how far they belong to it. Steps 2 and 3 repeat.

    Args:
        tokens: `(B, H*W, D)` in raster order, any float dtype; distances and sums are in float32 at least.
        grid: `(H, W)` of the tokens.
        clusters: `(h, w)` of the centres, `h <= H`, `w <= W`.
        tau: sharpness, a number or one per row `(B,)`.
        iterations: at least 0; 0 gives the means of the cells.
        window: odd, in cells of the smaller grid.

    Returns:
        Centres `(B, h*w, D)` in raster order, float32 (float64 for float64 tokens). Cost `O(iterations H W D min(h w, c window^2))`, where c
        is about 4; temporary memory about 4 times the centres and `4 window^2` numbers per token. `index_add` on CUDA adds in any order.

    Raises:
        ValueError: more centres than tokens along a side, an even window, or a negative number of iterations.
    """
    check_grids(grid, clusters)
    if window < 1 or window % 2 == 0:
        raise ValueError(
            f"cluster: window must be odd and at least 1, got {window}; 5 lets a token join its own cell and two on every side"
        )
    if iterations < 0:
        raise ValueError(f"cluster: iterations must be at least 0, got {iterations}")
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    centres = cell_means(wide, grid, clusters)
    if not iterations:
        return centres
    tiles = tiles_of(grid, clusters, window, tokens.device)
    if fused() and wide.dtype == torch.float32 and not (tokens.requires_grad and torch.is_grad_enabled()):  # the kernels have no gradient
        return _by_kernels(tokens, centres, tiles, tau, iterations)
    batch = len(tokens)
    count, box = tiles.centres.shape
    parts = wide[:, tiles.tokens].flatten(0, 1)  # (B T, n, D)
    bias = tiles.bias.to(wide.dtype).repeat(batch, 1, 1)  # (B T, n, m)
    sharp = tau if isinstance(tau, (int, float)) else tau.to(wide).view(-1, 1, 1)
    place = tiles.centres.flatten()
    for _ in range(iterations):
        key, alpha = (centres, 2 * sharp) if isinstance(sharp, (int, float)) else (2 * sharp * centres, 1)
        key = key.index_select(1, place).unflatten(1, (count, box)).flatten(0, 1)  # (B T, m, D)
        norm = (-sharp * centres.square().sum(-1, keepdim=True)).index_select(1, place)  # the token's own is the same for all centres
        shift = bias + norm.view(batch * count, 1, box)
        member = torch.baddbmm(shift, parts, key.mT, alpha=alpha).softmax(-1)  # (B T, n, m)
        centres = tile_means(member, parts, tiles, centres.shape)
    return centres


def tile_means(member: Tensor, parts: Tensor, tiles: Tiles, shape: torch.Size) -> Tensor:
    """Centres of `shape (B, h*w, D)`: the means of the tokens of tiles, `parts (B T, n, D)`, weighted by `member (B T, n, m)`."""
    if tiles.real is not None:
        member = member * tiles.real.repeat(shape[0], 1, 1)
    place = tiles.centres.flatten()
    weight = member.new_zeros(shape[:2]).index_add_(1, place, member.sum(1).view(shape[0], -1))
    summed = (member.mT @ parts).view(shape[0], -1, shape[2])
    return summed.new_zeros(shape).index_add_(1, place, summed) / weight.clamp_min(1e-16)[..., None]


def _by_kernels(tokens: Tensor, centres: Tensor, tiles: Tiles, tau: float | Tensor, iterations: int) -> Tensor:
    from vtr.ops._triton_cluster import clustered

    sharp = torch.as_tensor(tau, dtype=torch.float32, device=tokens.device).expand(len(tokens))
    real = tiles.real[..., 0] if tiles.real is not None else torch.ones(tiles.tokens.shape, device=tokens.device)
    return clustered(tokens, centres, tiles.tokens, tiles.centres, tiles.bias, real, tiles.holders, sharp, iterations)


def cell_means(tokens: Tensor, grid: Grid, clusters: Grid) -> Tensor:
    """Adaptive average pooling of `tokens (B, H*W, D)` to `(B, h*w, D)`, both in raster order."""
    if grid == clusters:
        return tokens
    pooled = F.adaptive_avg_pool2d(
        tokens.unflatten(1, grid).permute(0, 3, 1, 2), clusters
    )  # strides of channels last, also of a single row
    return pooled.flatten(2).mT.contiguous()


def home_cells(grid: Grid, clusters: Grid, device: torch.device | None = None) -> Tensor:
    """`(H*W,)` int64: the cell `floor(y h / H) * w + floor(x w / W)` that each token lies in."""
    rows, cols = (torch.arange(n, device=device) * c // n for n, c in zip(grid, clusters, strict=True))
    return (rows[:, None] * clusters[1] + cols).flatten()


def cell_centres(grid: Grid, clusters: Grid, device: torch.device) -> Tensor:
    """`(h*w,)` int64: the token nearest to the centre of each cell; ties: lowest index."""
    return _members(grid, clusters, device)[0][:, 0]


def cell_pivots(grid: Grid, clusters: Grid, real: Tensor) -> tuple[Tensor, Tensor]:
    """The real token nearest to the centre of each cell (ties: lowest index).

    Args:
        grid, clusters: as for `cluster`.
        real: `(B, H*W)` bool.

    Returns:
        `(B, h*w)` int64, distinct, and `(B, h*w)` bool: whether the cell has a real token; where not, its nearest token stands in.
    """
    table, inside = _members(grid, clusters, real.device)
    there = real[:, table] & inside  # (B, h*w, most tokens of a cell)
    return table.expand(len(real), -1, -1).gather(2, there.to(torch.uint8).argmax(2, keepdim=True))[..., 0], there.any(2)


@outside_autocast
def hard_labels(tokens: Tensor, centres: Tensor) -> Tensor:
    """`(B, N)` int64: the nearest of all centres `(B, M, D)` of each token `(B, N, D)`; ties: lowest index. `O(N M D)`."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return squared_distances(wide, centres.to(wide.dtype)).argmin(-1)


def squared_distances(tokens: Tensor, centres: Tensor) -> Tensor:
    """`(B, N, M)` squared Euclidean distances of `(B, N, D)` and `(B, M, D)`, at least 0, in the dtype given."""
    both = tokens.square().sum(-1, keepdim=True) + centres.square().sum(-1)[:, None]
    return torch.baddbmm(both, tokens, centres.mT, alpha=-2).clamp_min_(0)


def check_grids(grid: Grid, clusters: Grid) -> None:
    """Refuses a grid of centres that does not fit.

    Raises:
        ValueError: a side is below 1 or longer than the token grid's.
    """
    if not all(1 <= c <= n for n, c in zip(grid, clusters, strict=True)):
        raise ValueError(f"cluster: clusters {clusters} must be from (1, 1) to the token grid {grid}; ask for a smaller grid")


@constant
def _members(grid: Grid, clusters: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of each cell by distance from its centre, `(h*w, most)` int64, and which entries are its own."""
    home = home_cells(grid, clusters)
    away = torch.zeros(len(home), dtype=torch.float64)
    for at, n, c in ((torch.arange(len(home)) // grid[1], grid[0], clusters[0]), (torch.arange(len(home)) % grid[1], grid[1], clusters[1])):
        away += ((at + 0.5) * c / n - at * c // n - 0.5).square() * (n / c) ** 2
    order = away.argsort(stable=True)
    order = order[home[order].argsort(stable=True)]  # by cell, inside it by distance
    count = torch.bincount(home, minlength=clusters[0] * clusters[1])
    place = torch.arange(int(count.max()))
    inside = place < count[:, None]
    first = (count.cumsum(0) - count)[:, None]
    return order[torch.where(inside, first + place, first)].to(device), inside.to(device)


class Tiles(NamedTuple):
    """How a grid is cut: T tiles of n tokens, each with a box of m centres.

    `tokens (T, n)` and `centres (T, m)` int64 in raster order; `bias (T, n, m)` float32, 0 for candidates and -inf for others; `real (T, n, 1)`
    float32, 0 where a token is another tile's (tiles overlap where their side does not divide the grid's), or None when none is.
    `candidates` int64 says where in `bias.flatten()` each candidate of each token lies, once.
    `holders (h*w, most)` int64 says where in `centres.flatten()` each centre lies, -1 behind the last place.
    """

    tokens: Tensor
    centres: Tensor
    bias: Tensor
    real: Tensor | None
    holders: Tensor
    candidates: Tensor


@constant
def tiles_of(grid: Grid, clusters: Grid, window: int, device: torch.device) -> Tiles:
    """The cheapest way to cut a grid into tiles, by multiply-adds and numbers moved; computed once per shape and device."""
    options = [[_cut(n, c, window // 2, side) for side in range(1, n + 1)] for n, c in zip(grid, clusters, strict=True)]

    def price(rows: _Cut, cols: _Cut) -> int:
        box = rows.box * cols.box
        return len(rows.tokens) * len(cols.tokens) * box * (2 * rows.side * cols.side + GATHER)

    rows, cols = min(((r, c) for r in options[0] for c in options[1]), key=lambda pair: price(*pair))
    tokens = _cross(rows.tokens, cols.tokens, grid[1])
    centres = _cross(rows.centres, cols.centres, clusters[1])
    home = home_cells(grid, clusters)[tokens]
    cells = [torch.stack([at // clusters[1], at % clusters[1]]) for at in (home, centres)]  # (2, T, n) and (2, T, m)
    apart = (cells[0][..., None] - cells[1][:, :, None]).abs().amax(0)  # (T, n, m)
    bias = torch.zeros(apart.shape).masked_fill_(apart > window // 2, -torch.inf)
    real = _cross(rows.real, cols.real, 2) == 3  # 2 * row + column, both 1
    candidates = ((bias == 0) & real[..., None]).flatten().nonzero()[:, 0].to(device)
    bias[~real] = 0  # a softmax over nothing would be NaN
    real_or_none = None if bool(real.all()) else real[..., None].float().to(device)
    holders = _holders(centres, clusters).to(device)
    return Tiles(tokens.to(device), centres.to(device), bias.to(device), real_or_none, holders, candidates)


def _holders(centres: Tensor, clusters: Grid) -> Tensor:
    flat = centres.flatten()
    order = flat.argsort(stable=True)
    count = torch.bincount(flat, minlength=clusters[0] * clusters[1])
    rank = torch.arange(len(flat)) - (count.cumsum(0) - count)[flat[order]]
    table = torch.full((len(count), int(count.max())), -1)
    table[flat[order], rank] = order
    return table


class _Cut(NamedTuple):
    """One side of a grid in pieces: `tokens`, `real` (0 or 1) `(pieces, side)` and `centres (pieces, box)` along it."""

    side: int
    box: int
    tokens: Tensor
    real: Tensor
    centres: Tensor


def _cut(n: int, clusters: int, reach: int, side: int) -> _Cut:
    first = torch.arange(0, n, side)
    last = (first + side).clamp_max(n) - 1
    low = (first * clusters // n - reach).clamp_min(0)
    box = int(((last * clusters // n + reach).clamp_max(clusters - 1) - low).max()) + 1
    tokens = first.clamp_max(n - side)[:, None] + torch.arange(side)
    centres = low.clamp_max(clusters - box)[:, None] + torch.arange(box)
    return _Cut(side, box, tokens, (tokens >= first[:, None]).long(), centres)


def _cross(rows: Tensor, cols: Tensor, stride: int) -> Tensor:
    """`rows (R, a)`, `cols (C, b)` -> `(R C, a b)`: `row * stride + col` of every pair inside every pair of pieces."""
    return (rows[:, None, :, None] * stride + cols[None, :, None, :]).flatten(2).flatten(0, 1)
