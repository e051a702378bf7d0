"""Pool: average visual tokens over the cells of a coarser grid, as many cells as the budget.

Paper: none; ours. With keep = r x c it is adaptive average pooling, the usual training-free baseline.
Stage: boundary; tower in a ViT without an LLM. Reads: visual tokens and their cells. Batch: any. Deterministic: yes.

1. The thumbnail (or the only view) and the canvas of crops are two parts; the budget is shared by their token counts, largest remainder.
2. A part of R x C tokens with budget k is cut into round(sqrt(k R / C)) row bands of equal height, at least ceil(k / C).
3. A band has floor(k / bands) or one more cells, spread so that they sum to k. Bands and cells span what adaptive average pooling spans:
   from floor(i R / bands) to ceil((i + 1) R / bands), and the same for columns.
4. A cell becomes one token, the mean of its tokens weighted by size, at the place of the real token nearest to its centre.

On a ViT without an LLM the token grid is pooled to r x c in front of block alpha, and every token gets the bilinear interpolation of the
pooled grid back where the tokens are read; keep (or the grid) says how small.

Where a part has holes (an earlier method removed tokens), cells without a token or with an already used one are replaced by the first
tokens that are nobody's pivot, so that the count stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from vtr.ops.canvas import canvas_cells, on_device
from vtr.ops.clusters import cell_means, cell_pivots, home_cells
from vtr.ops.gather import index_to_mask, take
from vtr.ops.grids import by_grid, sides, stacked_rows, together
from vtr.ops.parts import extent
from vtr.ops.topk import quota, topk_mask
from vtr.registry import register_method
from vtr.types import (
    BUDGETS,
    Boundary,
    Budget,
    Card,
    FrameOption,
    Geometry,
    Merge,
    Method,
    Restore,
    Selection,
    Stage,
    Step,
    Tower,
    View,
    is_integer,
)


def pool_cells(height: Tensor, width: Tensor, cells: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Where cell number `cell` of a part lies (steps 2 and 3). All arguments int64 of one shape.

    Args:
        height, width: R and C of the part.
        cells: k, at least 1 and at most R C (less only for parts without cells, whose result means nothing).
        cell: which, in raster order.

    Returns:
        `box (4, ...)` int64: top, bottom, left, right, ends exclusive; `centre (2, ...)` float64: row and column in token coordinates.
    """
    cells, height, width = cells.clamp_min(1), height.clamp_min(1), width.clamp_min(1)
    bands = (cells * height / width).double().sqrt().round().long()
    bands = bands.maximum(-(-cells // width)).minimum(height).minimum(cells)
    band = ((cell + 1) * bands - 1) // cells
    across = (band + 1) * cells // bands - band * cells // bands  # cells of this band
    place = cell - band * cells // bands
    box = [band * height // bands, -(-(band + 1) * height // bands), place * width // across, -(-(place + 1) * width // across)]
    centre = [(2 * band + 1) * height / (2 * bands) - 0.5, (2 * place + 1) * width / (2 * across) - 0.5]
    return torch.stack(box), torch.stack([c.double() for c in centre])


def pool(
    tokens: Tensor, size: Tensor, part: Tensor, row: Tensor, col: Tensor, real: Tensor, keep: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages tokens over cells.

    Args:
        tokens: `(G, N, D)`; size: `(G, N)` float32 weights.
        part: `(G, N)` int64, 0 or 1.
        row, col: `(G, N)` int64 inside the part.
        real: `(G, N)` bool, True where a row has a token.
        keep: `(G,)` int64, at most `real.sum(1)`.
        most: `keep.max()` as a Python int.

    Returns:
        Keep mask `(G, N)`, tokens `(G, N, D)` whose kept rows are the means, and `assign (G, N)` int64. `O(most N D)`.
    """
    n = real.shape[1]
    member = (part[:, None] == torch.arange(2, device=part.device)[:, None]) & real[:, None]  # (G, 2, N)
    count = member.sum(2)
    top, bottom = extent(row, member)
    left, right = extent(col, member)
    share = quota(count.double(), count, keep)  # (G, 2)

    number = torch.arange(most, device=keep.device).expand(len(keep), most)
    second = (number >= share[:, :1]).long()  # (G, K): the part of each cell
    used = number < keep[:, None]
    box, centre = pool_cells(
        (bottom - top).gather(1, second), (right - left).gather(1, second), share.gather(1, second), number - second * share[:, :1]
    )
    y, x = row - top.gather(1, part), col - left.gather(1, part)
    inside = (y[:, None] >= box[0][..., None]) & (y[:, None] < box[1][..., None])
    inside &= (x[:, None] >= box[2][..., None]) & (x[:, None] < box[3][..., None])
    inside &= (part[:, None] == second[..., None]) & real[:, None] & used[..., None]  # (G, K, N)
    away = (y[:, None] - centre[0][..., None]).square() + (x[:, None] - centre[1][..., None]).square()
    away = away.float().masked_fill(~inside, torch.inf)

    pivot = away.argmin(2)  # (G, K)
    found = inside.any(2)
    pivots = index_to_mask(pivot, found, n)
    kept = topk_mask(pivots.float(), real, keep)  # fills up where cells were empty or shared a pivot
    owner = ((pivot[..., None] == torch.arange(n, device=pivot.device)) & found[..., None]).to(torch.uint8).argmax(1)  # (G, N)
    weight = inside.float() * size.float()[:, None]
    mean = (weight @ tokens.float()) / weight.sum(2, keepdim=True).clamp_min(1e-12)  # (G, K, D)
    alone = inside.sum(2) == 1
    fresh = pivots & ~alone.gather(1, owner)
    nearest = torch.where(inside.any(1), pivot.gather(1, away.argmin(1)), -1)  # the cell whose centre is closest
    assign = torch.where(kept, torch.arange(n, device=pivot.device), nearest)
    return kept, torch.where(fresh[..., None], take(mean, owner).to(tokens.dtype), tokens), assign


@register_method("pool")
@dataclass(frozen=True, kw_only=True)
class Pool(Method):
    """Grid average pooling at the boundary; the default budget is a third, the 192 of 576 of most tables."""

    alpha: int | None = None
    grid: tuple[int, int] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "tower")
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    card: ClassVar[Card] = Card(
        title="Pool: grid average pooling to an exact number of tokens",
        paper="none (reference row)",
        signals="visual tokens",
        cost="one product of (keep, N) weights with the tokens",
        ours=True,
        settings={
            "alpha": "ViTs without an LLM: blocks at full resolution before pooling; None: 10 of 24",
            "grid": "ViTs without an LLM: (rows, cols) of the pooled grid; None: the largest proportional one that the budget allows",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is not None:
            if (
                not isinstance(self.grid, (list, tuple))
                or len(self.grid) != 2
                or any(not is_integer(side) or side < 1 for side in self.grid)
            ):
                raise ValueError(f"pool: grid must be (rows, cols), both at least 1, got {self.grid!r}")
            given = [f"{name}={getattr(self, name)}" for name in BUDGETS if getattr(self, name) is not None]
            if given:
                raise ValueError(f"pool: grid={tuple(self.grid)} says how many tokens stay, got {given[0]} beside it; give one of the two")
            object.__setattr__(self, "grid", tuple(self.grid))  # YAML and JSON hand in lists

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if not geometry.llm_layers:
            return self._dense_steps(geometry)
        if self.alpha is not None or self.grid is not None:
            raise ValueError("pool: alpha and grid are for ViTs without an LLM; give keep or keep_ratio")
        return (Merge(Boundary(), _select),)

    def _dense_steps(self, geometry: Geometry) -> tuple[Step, ...]:
        depth = geometry.feature_layer + 1
        alpha = round(depth * 10 / 24) if self.alpha is None else self.alpha
        if not geometry.first_layer <= alpha < depth:
            raise ValueError(
                f"pool: alpha={alpha} must be from {geometry.first_layer} to {depth - 1}, so that some of the {depth} blocks run on the "
                "pooled grid"
            )
        small = None if self.grid is None else partial(_fitting, small=self.grid)
        if small is not None and geometry.fixed_grid and geometry.patch_grid is not None:
            small(geometry.patch_grid)
        select = partial(_pool_grid, small=self.grid)
        merge = Merge(Tower(alpha), select, counted=small is None, proportional=False, grid=small)
        return merge, Restore(Tower(depth), _interpolate)


def pooled_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """The grid of at most `keep` cells whose sides shrink most alike: most cells, then nearest to the aspect of `grid`."""
    rows = range(1, grid[0] + 1)
    fitting = [(r, min(max(keep // r, 1), grid[1])) for r in rows if r <= keep]
    alike = [(r, c) for r, c in fitting if abs(r / grid[0] - c / grid[1]) <= 1 / min(grid)]
    return max(alike or fitting, key=lambda g: (g[0] * g[1], -abs(g[0] / grid[0] - g[1] / grid[1])))


class _Pool(NamedTuple):
    """Groups whose token grid `grid` was pooled to `cells`."""

    grid: tuple[int, int]
    cells: tuple[int, int]
    groups: list[int]


def _fitting(grid: tuple[int, int], small: tuple[int, int]) -> tuple[int, int]:
    if small[0] > grid[0] or small[1] > grid[1]:
        raise ValueError(f"pool: grid {small} is larger than the token grid {grid}; ask for a smaller one")
    return small


def _pool_grid(view: View, small: tuple[int, int] | None) -> Selection:
    grids = [view.grid(group) for group in range(len(view.grids))]
    pools, found = [], []
    for grid, groups in by_grid(grids):
        own = slice(None) if len(groups) == len(grids) else groups
        cells = pooled_grid(grid, max(view.keeps[group] for group in groups)) if small is None else _fitting(grid, small)
        n = grid[0] * grid[1]
        pivot, _ = cell_pivots(grid, cells, view.real[own, :n])
        used = torch.ones_like(pivot, dtype=torch.bool)
        assign = pivot[:, home_cells(grid, cells, view.tokens.device)]
        found.append((pivot, used, cell_means(view.tokens[own, :n], grid, cells), assign))
        pools.append(_Pool(grid, cells, groups))
    view.memory["pools"] = pools
    index, real, tokens, assign = (together(part, [pool.groups for pool in pools]) for part in zip(*found, strict=True))
    if len(pools) == 1:
        return Selection(index=index, tokens=tokens, assign=assign, grid=pools[0].cells)
    return Selection(index=index, real=real, tokens=tokens, assign=assign)


def _interpolate(view: View) -> Tensor:
    """Bilinear, cell centres over token centres."""
    pools: list[_Pool] = view.memory["pools"]
    parts = []
    for pool in pools:
        own = slice(None) if len(pools) == 1 else pool.groups
        cells = rearrange(view.tokens[own, : pool.cells[0] * pool.cells[1]], "g (r c) d -> g d r c", r=pool.cells[0])
        wide = F.interpolate(cells.float(), size=pool.grid, mode="bilinear", align_corners=False)
        parts.append(rearrange(wide, "g d r c -> g (r c) d"))
    return together(parts, [pool.groups for pool in pools])


def _select(view: View) -> Selection:
    crop_grid = on_device(view.crop_grids, view.tokens.device)
    canvas = (crop_grid[:, :1] > 0) & (view.cells[..., 0] > 0)  # (G, N): tokens of crops
    crops = [view.grid(group) if min(crop) else view.grids[group][0] for group, crop in enumerate(view.crop_grids)]
    row, col = canvas_cells(view.cells, crop_grid, sides(crops, view.tokens.device))
    row = torch.where(canvas, row, stacked_rows(view.cells, view.grids))
    col = torch.where(canvas, col, view.cells[..., 2])
    keep, tokens, assign = pool(view.tokens, view.sizes, canvas.long(), row, col, view.real, view.keep, view.most)
    return Selection(keep=keep, tokens=tokens, assign=assign)
