"""Groups of tokens whose grids `(rows, cols)` differ: their sides on the device, and functions that know one grid at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtr.ops.canvas import on_device

Grid = tuple[int, int]


def sides(grids: Sequence[Grid], device: torch.device) -> Grid | Tensor:
    """Returns the grid that all groups have, or where they differ `(G, 2)` int64 on the device."""
    return grids[0] if len(set(grids)) == 1 else on_device(grids, device)


def largest(grids: Sequence[Grid]) -> Grid:
    """Returns the most rows and the most columns of some grids."""
    return max(rows for rows, _ in grids), max(cols for _, cols in grids)


def by_grid(grids: Sequence[Grid]) -> list[tuple[Grid, list[int]]]:
    """Returns every grid with the groups that have it, in ascending order."""
    return [(grid, [group for group, own in enumerate(grids) if own == grid]) for grid in dict.fromkeys(grids)]


def together(parts: Sequence[Tensor], groups: Sequence[list[int]], fill: float = 0) -> Tensor:
    """Joins what was computed for some groups at a time.

    Args:
        parts: `(len(groups[i]), K_i, ...)` each.
        groups: which groups each of them has; every group is in one of them.
        fill: stands behind the K_i of the shorter ones.

    Returns:
        `(G, K, ...)` with the largest K, in ascending order of the groups.
    """
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[1] for part in parts)
    wide = [torch.cat([part, part.new_full((len(part), width - part.shape[1], *part.shape[2:]), fill)], 1) for part in parts]
    order = torch.tensor([group for own in groups for group in own]).argsort()
    return torch.cat(wide)[order.to(wide[0].device, non_blocking=True)]


def stacked_rows(cells: Tensor, grids: Sequence[Sequence[Grid]]) -> Tensor:
    """Returns the row `(G, N)` int64 of every token when the views of a group lie one under the other.

    Args:
        cells: `(G, N, 3)` int64 view, row, column.
        grids: of every view of every group.
    """
    views = max(len(own) for own in grids)
    starts = [[sum(rows for rows, _ in own[:view]) for view in range(views)] for own in grids]
    return on_device(starts, cells.device).gather(1, cells[..., 0]) + cells[..., 1]
