"""Hand-made Views, for testing a method's `select` without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtr.types import Signal, View


def grid_cells(rows: int, cols: int, views: int = 1) -> Tensor:
    """Cells `(views * rows * cols, 3)` of full views in raster order."""
    return torch.cartesian_prod(torch.arange(views), torch.arange(rows), torch.arange(cols)).view(-1, 3)


def view_of(
    cells: Sequence[Tensor],
    keep: Sequence[int],
    patch_grid: tuple[int, int] | Sequence[tuple[int, int]],
    crop_grids: Sequence[tuple[int, int]] | None = None,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    tokens: Tensor | None = None,
    signals: Mapping[Signal, Any] | None = None,
    pad: int = 0,
    seed: int = 0,
) -> View:
    """A View of one row per entry of `cells (n, 3)`; shorter rows are filled at the end with entries that are not real.

    `patch_grid` is the grid of the views of all groups, or one for each group.
    """
    groups, most = len(cells), max(len(c) for c in cells) + pad
    own = [patch_grid] * groups if isinstance(patch_grid[0], int) else list(patch_grid)
    crops = list(crop_grids) if crop_grids else [(0, 0)] * groups
    sides = torch.tensor(own)[:, None]
    padded = torch.zeros(groups, most, 3, dtype=torch.int64)
    real = torch.zeros(groups, most, dtype=torch.bool)
    for group, cell in enumerate(cells):
        padded[group, : len(cell)], real[group, : len(cell)] = cell, True
    generator = torch.Generator().manual_seed(seed)
    return View(
        tokens=torch.randn(groups, most, 8, generator=generator) if tokens is None else tokens,
        real=real,
        keep=torch.tensor(keep),
        counts=[len(c) for c in cells],
        keeps=list(keep),
        most=max(keep),
        row=torch.arange(groups),
        cells=padded,
        patch=(padded[..., 0] * sides[..., 0] + padded[..., 1]) * sides[..., 1] + padded[..., 2],
        grids=[
            [grid] * max(int(cell[:, 0].max()) + 1, 1 + rows * cols) for grid, cell, (rows, cols) in zip(own, cells, crops, strict=True)
        ],
        crop_grids=crops,
        image_sizes=list(image_sizes) if image_sizes else [(0, 0)] * groups,
        sizes=torch.ones(groups, most),
        checksum=torch.arange(groups) * 1000 + 17,
        signals=dict(signals or {}),
    )


def one_row(view: View, row: int) -> View:
    """The same View with one of its rows only, without the padding that its neighbours needed."""
    n, keep = view.counts[row], int(view.keep[row])
    pick = slice(row, row + 1)
    return View(
        tokens=view.tokens[pick, :n],
        real=view.real[pick, :n],
        keep=view.keep[pick],
        counts=[n],
        keeps=[keep],
        most=keep,
        row=view.row[pick],
        cells=view.cells[pick, :n],
        patch=view.patch[pick, :n],
        grids=view.grids[pick],
        crop_grids=view.crop_grids[pick],
        image_sizes=view.image_sizes[pick],
        sizes=view.sizes[pick, :n],
        checksum=view.checksum[pick],
        signals={signal: value[pick, :n] for signal, value in view.signals.items()},
    )
