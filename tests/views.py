"""Hand-made Views, for testing a method's `select` without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Video:
    """One video of a hand-made View.

    Args:
        frames, grid: how many, and `(rows, cols)` of tokens of each.
        seed: of its tokens.
        gone: share of the tokens that an earlier method removed.
        scenes: stretches of frames that show the same but for `grain`; all frames differ where there are as many as frames.
        grain: size of what is new in a frame, against 1 for what is new in a scene.
    """

    frames: int
    grid: tuple[int, int]
    seed: int = 0
    gone: float = 0.0
    scenes: int = 3
    grain: float = 0.3

    def tokens(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Its tokens `(frames * rows * cols, width)` in time, then raster order."""
        random = torch.Generator().manual_seed(self.seed)
        places = self.grid[0] * self.grid[1]
        scenes = torch.randn(self.scenes, places, width, generator=random, dtype=torch.float64)
        shown = scenes[torch.arange(self.frames) * self.scenes // self.frames]
        return (shown + self.grain * torch.randn(shown.shape, generator=random, dtype=torch.float64)).flatten(0, 1).to(dtype)

    def left(self) -> Tensor:
        """Which of its tokens an earlier method left, ascending; at least one."""
        count = self.frames * self.grid[0] * self.grid[1]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + 77))
        return order[: max(1, count - round(self.gone * count))].sort().values


def video_view(
    videos: Sequence[Video],
    keep: Sequence[int] | int,
    *,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    filler: int = 0,
    signals: Mapping[Signal, Callable[[Video], Tensor]] | None = None,
) -> View:
    """A View of one video per row, filled in front with entries that are not real.

    `signals` gives what a video's tokens have, `(n, ...)` over all tokens that it once had.
    """
    kept = [video.left() for video in videos]
    counts = [len(left) for left in kept]
    most = max(counts) + filler
    keeps = [min(k, n) for k, n in zip([keep] * len(videos) if isinstance(keep, int) else keep, counts, strict=True)]
    tokens = torch.full((len(videos), most, width), 7.0, dtype=dtype)
    real, cells = torch.zeros(len(videos), most, dtype=torch.bool), torch.zeros(len(videos), most, 3, dtype=torch.int64)
    patch = torch.zeros(len(videos), most, dtype=torch.int64)
    found: dict[Signal, Any] = {}
    for g, (video, left) in enumerate(zip(videos, kept, strict=True)):
        own = slice(most - len(left), most)
        real[g, own], patch[g, own] = True, left
        tokens[g, own] = video.tokens(width, dtype)[left]
        cells[g, own] = torch.cartesian_prod(torch.arange(video.frames), *map(torch.arange, video.grid)).view(-1, 3)[left]
        for signal, value in (signals or {}).items():
            values = value(video)[left]
            found.setdefault(signal, values.new_zeros(len(videos), most, *values.shape[1:]))[g, own] = values
    return View(
        tokens=tokens,
        real=real,
        keep=torch.tensor(keeps),
        counts=counts,
        keeps=keeps,
        most=max(keeps),
        row=torch.arange(len(videos)),
        cells=cells,
        patch=patch,
        grids=[[video.grid] * video.frames for video in videos],
        crop_grids=[(0, 0)] * len(videos),
        image_sizes=[(0, 0)] * len(videos),
        sizes=torch.ones(len(videos), most),
        checksum=torch.tensor([1000 * video.seed + 17 for video in videos]),
        signals=found,
        kinds=["video"] * len(videos),
        frames=[video.frames for video in videos],
    )
