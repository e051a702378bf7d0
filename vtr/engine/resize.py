"""The input stage: images are made smaller in front of the tower, each to its own grid.

Views of one grid are embedded together; rows of different lengths are padded and masked like after any ragged removal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine.encoding import Encoding
from vtr.hosts._layout import by_patch
from vtr.hosts._protocol import Host

Grid = tuple[int, int]


def plan_resize(host: Host, run: Encoding, grids: list[Grid], pixels: Tensor) -> None:
    """Files the new patch grid of every row; each new patch stands for the full-grid patch at its centre.

    Args:
        host: the model.
        run: its rows are updated.
        grids: `(rows, cols)` of the views of each image.
        pixels: `(V, 3, H, W)`, kept until the embedding asks for them.
    """
    run.pixels, run.grids = pixels, [grids[i] for i in run.image]
    full = host.tower.patch_grid
    assert full is not None  # checked when the plan is made
    chosen = {grid: _centres(grid, full) for grid in set(grids)}
    run.there = [len(chosen[grid]) for grid in run.grids]
    width = max(run.there)
    column = torch.stack([torch.nn.functional.pad(chosen[grid], (width - len(chosen[grid]), 0)) for grid in run.grids])
    valid = torch.arange(width) >= width - torch.tensor(run.there)[:, None]
    tokens = [layout.patch >= 0 for layout in run.layouts]
    alive = by_patch(run.layouts, tokens, run.tokens.images.slots, False).view(len(tokens), -1)
    run.alive = [int(alive[i, chosen[grid] + v * host.tower.area].sum()) for i, v, grid in zip(run.image, run.view, run.grids, strict=True)]
    device = run.tokens.column.device
    run.tokens.column, run.tokens.valid = column.to(device, non_blocking=True), valid.to(device, non_blocking=True)
    run.tokens.full, run.short = len(set(run.there)) == 1, True


def _centres(grid: Grid, full: Grid) -> Tensor:
    """Full-grid patches at the centres of the cells of a smaller grid, in raster order."""
    rows, cols = (((torch.arange(n) * 2 + 1) * f) // (2 * n) for n, f in zip(grid, full, strict=True))
    return (rows[:, None] * full[1] + cols).flatten()


def embed_hooks(host: Host, current: Any) -> list[Any]:
    """Hooks on the tower's embedding module; `current()` is the run of this thread. Returns what `remove()` must undo."""
    module = host.tower.embeddings
    busy: set[int] = set()

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = current()
        if run is None or run.grids is None or id(run) in busy:
            return None
        pixels = _small(host, run, run.grids[0])
        return ((pixels, *args[1:]), _interpolated(kwargs)) if args else (args, _interpolated({**kwargs, "pixel_values": pixels}))

    def leave(_module: nn.Module, _args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        run = current()
        if run is None or run.grids is None or id(run) in busy:
            return None
        prefix, width = host.tower.prefix_tokens, max(run.there)
        full = output.new_zeros(len(run.grids), prefix + width, output.shape[-1])
        busy.add(id(run))
        try:
            for grid in dict.fromkeys(run.grids):
                rows = [i for i, g in enumerate(run.grids) if g == grid]
                part = output if grid == run.grids[0] else module(_small(host, run, grid), interpolate_pos_encoding=True)
                spread = torch.nn.functional.pad(part[:, prefix:], (0, 0, width - (part.shape[1] - prefix), 0))
                full[rows] = torch.cat([part[:, :prefix], spread], 1)
        finally:
            busy.discard(id(run))
        run.pixels = run.grids = None
        return full

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True).remove,
        module.register_forward_hook(leave, with_kwargs=True).remove,
    ]


def _small(host: Host, run: Encoding, grid: Grid) -> Tensor:
    """Pixel values of the rows of one grid, resized (bicubic with antialiasing, as CLIP's own preprocessing)."""
    assert run.pixels is not None and run.grids is not None
    pixels = run.pixels[[i for i, g in enumerate(run.grids) if g == grid]]
    size = (grid[0] * host.tower.patch_size, grid[1] * host.tower.patch_size)
    small = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    return small.to(pixels.dtype)


def _interpolated(kwargs: dict) -> dict:
    return {**kwargs, "interpolate_pos_encoding": True}
