"""The canvas of an AnyRes image: its crops side by side, and the thumbnail laid over their valid region.

`cells (G, N, 3)` int64 holds view (0 = thumbnail), row and column; crops are views 1, 2, ... in raster order of the crop grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

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


def on_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Nested host integers as an int64 tensor, without waiting for the device."""
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


Grid = tuple[int, int]
Tables = list[list[list[int]]]
"""What is known of the rows and of the columns of every crop: `2 x crops x side` integers."""


def of_crops(make: Callable[..., Tables], keys: Sequence[tuple[Any, ...]], device: torch.device) -> Tensor:
    """Returns the tables that `make` has for the key of each group, `(G, 2, crops, side)` int64, or `(1, 2, crops, side)` where all are the same."""
    return on_device([make(*key) for key in (keys[:1] if len({*keys}) == 1 else keys)], device)


@lru_cache(maxsize=1024)
def even_blocks(crop_grid: Grid, patch_grid: Grid, crops: int, side: int) -> Tables:
    """Returns 1 for every row and column of a thumbnail in the block of a crop, else 0; the last blocks take the remainder."""
    down, across = (
        [min(at // max(cells // number, 1), number - 1) for at in range(cells)]
        for number, cells in zip((max(number, 1) for number in crop_grid), patch_grid, strict=True)
    )
    return _blocks(crop_grid, down, across, crops, side)


@lru_cache(maxsize=1024)
def shown_blocks(crop_grid: Grid, patch_grid: Grid, region: tuple[int, ...], crops: int, side: int) -> Tables:
    """Returns 1 for every row and column of a thumbnail whose centre a crop shows, else 0, when it is laid over the valid `region` of the canvas."""
    down, across = (  # twice the centre times the patches of a side: integers, so that borders are exact
        [(2 * first * cells + (2 * at + 1) * (end - first)) // (2 * cells * cells) for at in range(cells)]
        for first, end, cells in zip(region[::2], region[1::2], patch_grid, strict=True)
    )
    return _blocks(crop_grid, down, across, crops, side)


def _blocks(crop_grid: Grid, down: list[int], across: list[int], crops: int, side: int) -> Tables:
    own = [divmod(crop, crop_grid[1]) if crop < crop_grid[0] * crop_grid[1] else (-1, -1) for crop in range(crops)]
    lines = [[*line, *[-2] * (side - len(line))] for line in (down, across)]
    return [[[int(at == crop[axis]) for at in lines[axis]] for crop in own] for axis in (0, 1)]


@lru_cache(maxsize=1024)
def canvas_lines(crop_grid: Grid, patch_grid: Grid, crops: int, side: int) -> Tables:
    """Returns the row and the column of the canvas of every row and column of a crop."""
    own = [divmod(crop, max(crop_grid[1], 1)) for crop in range(crops)]
    return [[[crop[axis] * patch_grid[axis] + at for at in range(side)] for crop in own] for axis in (0, 1)]


def block_sums(grid: Tensor, blocks: Tensor) -> Tensor:
    """Returns the sums of a thumbnail map `(G, S, S)` over the block of each crop: `(G, crops)` float64, 0 where a group has fewer crops.

    `blocks (G, 2, crops, S)` int64 are those of `even_blocks` or `shown_blocks`; so is the first dimension 1 where all groups have the same.
    """
    down, across = blocks.double().unbind(1)
    return ((grid.double() @ across.mT) * down.mT).sum(1)


class Crops(NamedTuple):
    """Where the crops of each group lie; the first dimension is 1 instead of G where all groups have the same.

    `blocks` and `lines (G, 2, crops, S)` int64 of `even_blocks` and `canvas_lines`; `own` and `whole (G, 2, 1, 1)` int64, patches of a view and of
    the canvas in rows and in columns; `number (G, 1)` int64 of crops.
    """

    blocks: Tensor
    lines: Tensor
    own: Tensor
    whole: Tensor
    number: Tensor


def crops_of(crop_grids: Sequence[Grid], patch_grids: Sequence[Grid], side: int, device: torch.device) -> Crops:
    """Returns where the crops of each group lie, from its grid of crops and the grid of patches of its views, the longest of which is `side`."""
    crops = max(rows * cols for rows, cols in crop_grids)
    keys = [(*both, crops, side) for both in zip(crop_grids, patch_grids, strict=True)]
    blocks, lines = (of_crops(make, keys, device) for make in (even_blocks, canvas_lines))
    sizes = [[[n, max(c, 1) * n, rows * cols] for n, c in zip(own, (rows, cols), strict=True)] for (rows, cols), own, *_ in keys]
    own, whole, number = on_device(sizes[: len(blocks)], device)[..., None, None].unbind(2)
    return Crops(blocks, lines, own, whole, number[:, 0, 0])


def spread_over(thumbnail: Tensor, there: Tensor, crops: Crops) -> Tensor:
    """Returns what a bilinear resize (corners not aligned) of the thumbnail to the valid region of the canvas holds at the cells of each crop.

    The valid region lies in the middle of the canvas, with as much free on one side as on the other.

    Args:
        thumbnail: `(G, S, S)` float.
        there: `(G, crops, S, S)` bool, cells of crops that have a token.
        crops: where they lie.

    Returns:
        `(G, crops, S, S)` in the dtype of `thumbnail`; of cells without a token anything.
    """
    shown = torch.stack([there.any(3), there.any(2)], 1)  # (G, 2, crops, S)
    start = torch.where(shown, crops.lines, crops.whole).amin((2, 3), keepdim=True)
    scale = crops.own.to(thumbnail.dtype) / (crops.whole - 2 * start)
    source = ((crops.lines - start + 0.5) * scale - 0.5).clamp_min(0).minimum(crops.own - 1)
    first = source.floor()
    low, share = first.long(), source - first
    high = (low + 1).minimum(crops.own - 1)
    spread = thumbnail[:, None].expand(-1, there.shape[1], -1, -1)
    for axis, dim in ((0, 2), (1, 3)):
        start, end = (spread.gather(dim, at[:, axis].unsqueeze(5 - dim).expand_as(spread)) for at in (low, high))
        spread = torch.lerp(start, end, share[:, axis].unsqueeze(5 - dim))
    return spread
