"""Rotary tables of a smaller grid of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]


def cell_rotation(cos: Tensor, sin: Tensor, grid: Grid, clusters: Grid) -> tuple[Tensor, Tensor]:
    """Rotary tables of cells that have the mean coordinates of their tokens, whatever frequencies made the tables.

    The mean of the coordinates of a cell (the span of adaptive average pooling) is a token, or lies half-way between two along a side. There
    the rotation is the mean direction of those tokens', exact as long as neighbouring tokens differ by less than half a turn.

    Args:
        cos, sin: `(..., H*W, d)`, tokens in raster order; both are treated alike, so that their order does not matter.
        grid: `(H, W)`.
        clusters: `(h, w)`.

    Returns:
        The tables `(..., h*w, d)` in the dtype given.
    """
    if grid == clusters:
        return cos, sin
    middle = [_middle(n, c, cos.device) for n, c in zip(grid, clusters, strict=True)]
    spots = [(row[:, None] * grid[1] + col).flatten() for row in middle[0] for col in middle[1]]
    wide = torch.promote_types(cos.dtype, torch.float32)
    x, y = (torch.stack([table.to(wide)[..., spot, :] for spot in spots]).sum(0) for table in (cos, sin))
    length = torch.hypot(x, y).clamp_min(1e-12)
    return (x / length).to(cos.dtype), (y / length).to(sin.dtype)


def _middle(n: int, clusters: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The one or two middle tokens of each cell along a side, lower and upper, `(clusters,)` int64 each."""
    cell = torch.arange(clusters, device=device)
    ends = cell * n // clusters + -(-(cell + 1) * n // clusters)  # first token + end
    return (ends - 1) // 2, ends // 2
