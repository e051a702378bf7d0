"""The canvas of an AnyRes image: its crops side by side, and the thumbnail laid over their valid region.

`cells (G, N, 3)` int64 holds view (0 = thumbnail), row and column; crops are views 1, 2, ... in raster order of the crop grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def valid_region(
    image_size: tuple[int, int], crop_grid: tuple[int, int], patch_grid: tuple[int, int], digits: int | None = None
) -> list[int]:
    """Canvas rows and columns that show the image rather than padding.

    Args:
        image_size: `(height, width)` in pixels.
        crop_grid: `(rows, cols)` of crops.
        patch_grid: `(rows, cols)` of patches of a crop.
        digits: decimals the scaled side is rounded to before it is cut to an integer: None as in LLaVA, 7 as in transformers.

    Returns:
        `[top, bottom, left, right]`, bottom and right exclusive.
    """
    height, width = image_size
    rows, cols = crop_grid[0] * patch_grid[0], crop_grid[1] * patch_grid[1]
    if width / height > cols / rows:
        scaled = height * (cols / width)
        pad = (rows - int(scaled if digits is None else round(scaled, digits))) // 2
        return [pad, rows - pad, 0, cols]
    scaled = width * (rows / height)
    pad = (cols - int(scaled if digits is None else round(scaled, digits))) // 2
    return [0, rows, pad, cols - pad]


def on_device(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Host integers as an int64 tensor, without waiting for the device."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def rows_and_cols(grid: tuple[int, int] | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """Returns both sides of the one grid of all groups, or of the grids `(G, 2)`, as `(G, 1)` each."""
    return (grid[:, :1], grid[:, 1:]) if isinstance(grid, Tensor) else grid


def canvas_cells(cells: Tensor, crop_grid: Tensor, patch_grid: tuple[int, int] | Tensor) -> tuple[Tensor, Tensor]:
    """Returns row and column on the canvas of every crop token, `(G, N)` int64 each; they mean nothing for the thumbnail.

    Args:
        cells: `(G, N, 3)` int64.
        crop_grid: `(G, 2)` int64 rows and columns of crops.
        patch_grid: of a crop: `(rows, cols)` for all groups, or `(G, 2)` int64.
    """
    view, row, col = cells.unbind(-1)
    rows, cols = rows_and_cols(patch_grid)
    crop, across = (view - 1).clamp_min(0), crop_grid[:, 1:].clamp_min(1)
    return crop // across * rows + row, crop % across * cols + col


def block_sums(grid: Tensor, crop_grid: Tensor, crops: int, own: tuple[int, int] | Tensor | None = None) -> Tensor:
    """Returns the sums of a thumbnail map over the block that each crop covers.

    Args:
        grid: `(G, R, C)`, zeros behind a map that is smaller.
        own: size of the maps where they are smaller than `(R, C)`: `(rows, cols)` of all, or `(G, 2)` int64.
        crop_grid: `(G, 2)` int64; blocks are `max(R // rows, 1)` by `max(C // cols, 1)`, the last ones take the remainder.
        crops: the most crops of a group.

    Returns:
        `(G, crops)` float64 in raster order; 0 where a group has fewer crops.
    """
    rows, cols = rows_and_cols((grid.shape[1], grid.shape[2]) if own is None else own)
    down, across = crop_grid[:, :1].clamp_min(1), crop_grid[:, 1:].clamp_min(1)
    row = torch.minimum(torch.arange(grid.shape[1], device=grid.device) // (rows // down).clamp_min(1), down - 1)  # (G, R)
    col = torch.minimum(torch.arange(grid.shape[2], device=grid.device) // (cols // across).clamp_min(1), across - 1)
    block = (row[:, :, None] * across[:, :, None] + col[:, None]).flatten(1)  # (G, R * C)
    member = block[:, None] == torch.arange(crops, device=grid.device)[:, None]
    return torch.where(member, grid.double().flatten(1)[:, None], 0).sum(-1)


def resized_at(
    grid: Tensor, row: Tensor, col: Tensor, height: Tensor, width: Tensor, own: tuple[int, int] | Tensor | None = None
) -> Tensor:
    """Returns what a bilinear resize of `grid` to `height x width` (corners not aligned) holds at some of its pixels only.

    Args:
        grid: `(G, R, C)` float.
        own: size of the maps where they are smaller than `(R, C)`: `(rows, cols)` of all, or `(G, 2)` int64.
        row, col: `(G, N)` int64 pixels of the result.
        height, width: `(G,)` int64 size of the result, different per group.

    Returns:
        `(G, N)` in the dtype of `grid`.
    """
    rows, cells = rows_and_cols((grid.shape[1], grid.shape[2]) if own is None else own)
    top, low, down = _neighbours(row, height, rows, grid.dtype)
    left, right, across = _neighbours(col, width, cells, grid.dtype)
    flat, cols = grid.flatten(1), grid.shape[2]
    upper = flat.gather(1, top * cols + left) * (1 - across) + flat.gather(1, top * cols + right) * across
    lower = flat.gather(1, low * cols + left) * (1 - across) + flat.gather(1, low * cols + right) * across
    return upper * (1 - down) + lower * down


def _neighbours(at: Tensor, length: Tensor, cells: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the two source cells of each pixel along one axis, and the weight of the second; `cells` of all groups, or `(G, 1)`."""
    source = _at_most(((at.to(dtype) + 0.5) * (cells / length.to(dtype)[:, None]) - 0.5).clamp_min(0), cells - 1)
    first = source.floor().long()
    return first, _at_most(first + 1, cells - 1), source - first


def _at_most(values: Tensor, limit: int | Tensor) -> Tensor:
    return values.minimum(limit.to(values.dtype)) if isinstance(limit, Tensor) else values.clamp_max(limit)
