"""Tokens of videos frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.ops.canvas import on_device
from vtr.ops.gather import take
from vtr.ops.grids import Grid


class Frames(NamedTuple):
    """Holds the tokens of videos by frame and place: those at one place of all frames of a video show the same part of the picture.

    Args:
        tokens: `(G, T, P, D)`; zero where there is none.
        real: `(G, T, P)` bool, False for removed tokens, and behind the frames and places of a video that has fewer than others.
        spot: `(G, T, P)` int64 into the tokens of the View; 0 where there is none.
        there: `(G, T)` bool, frames that the video has, be they empty or not.
        size: N, the tokens of the View.
    """

    tokens: Tensor
    real: Tensor
    spot: Tensor
    there: Tensor
    size: int

    def flat(self, values: Tensor) -> Tensor:
        """Returns what belongs to the tokens `(G, T, P, ...)` in the order of the View `(G, N, ...)`; zero, or False, for filler."""
        target = torch.where(self.real, self.spot, self.size).flatten(1)
        parts = values.flatten(1, 2)
        made = values.new_zeros(len(values), self.size + 1, *values.shape[3:])
        shaped = target.view(*target.shape, *[1] * (parts.ndim - 2)).expand_as(parts)
        return made.scatter(1, shaped, parts)[:, :-1]


def by_frame(tokens: Tensor, real: Tensor, cells: Tensor, grids: Sequence[Grid], frames: Sequence[int], whole: bool = False) -> Frames:
    """Returns the tokens of videos by frame and place in the frame, `row * cols + column`. `O(N D)`, no host sync.

    Args:
        tokens: `(G, N, D)`, one row per video.
        real: `(G, N)` bool.
        cells: `(G, N, 3)` int64 frame, row, column.
        grids: `(rows, cols)` of the frames of each video.
        frames: of each video.
        whole: known on the host: no token of any video is gone.
    """
    count, places = max(frames), max(rows * cols for rows, cols in grids)
    device, (groups, size) = tokens.device, real.shape
    shape = (count, places)
    if whole and len(set(grids)) == 1 and size == count * places and min(frames) == count:
        spot = torch.arange(size, device=device).view(1, count, places).expand(groups, -1, -1)
        there = torch.ones(groups, count, dtype=torch.bool, device=device)
        return Frames(tokens.unflatten(1, shape), real.unflatten(1, shape), spot, there, size)
    cols = on_device([[cols] for _, cols in grids], device)
    slot = torch.where(real, cells[..., 0] * places + cells[..., 1] * cols + cells[..., 2], count * places)
    numbers = torch.arange(size, device=device).expand(groups, -1)
    spot = torch.full((groups, count * places + 1), -1, device=device).scatter_(1, slot, numbers)[:, :-1]
    found, spot = spot >= 0, spot.clamp_min(0)
    values = take(tokens, spot).masked_fill(~found[..., None], 0.0)
    there = torch.arange(count, device=device) < on_device([[own] for own in frames], device)
    return Frames(values.unflatten(1, shape), found.unflatten(1, shape), spot.unflatten(1, shape), there, size)
