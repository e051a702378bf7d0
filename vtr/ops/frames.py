"""Tokens of videos frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.ops.canvas import on_device
from vtr.ops.gather import take
from vtr.ops.grids import Grid
from vtr.ops.topk import topk_mask


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

    def of(self, values: Tensor) -> Tensor:
        """Returns what the View knows of its tokens `(G, N, ...)` by frame and place `(G, T, P, ...)`; zero, or False, for filler."""
        found = take(values, self.spot.flatten(1)).unflatten(1, self.real.shape[1:])
        return found.masked_fill(~self.real.view(*self.real.shape, *[1] * (found.ndim - 3)), 0)

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


CHUNK = 2**21
"""Numbers that are widened to float64 at a time: what fits a CPU's caches; sixteen times as many elsewhere."""


def stretches(tokens: Tensor) -> list[slice]:
    """Returns the frames of `tokens (G, T, P, D)` in stretches of at most `CHUNK` numbers, or of one frame."""
    limit = CHUNK if tokens.device.type == "cpu" else 16 * CHUNK
    step = max(1, limit // max(1, tokens.shape[0] * tokens.shape[2] * tokens.shape[3]))
    return [slice(first, first + step) for first in range(0, tokens.shape[1], step)]


def channels(tokens: Tensor) -> list[slice]:
    """Returns the channels of `tokens (G, T, P, D)` in stretches of at most `CHUNK` numbers, or of one channel."""
    limit = CHUNK if tokens.device.type == "cpu" else 16 * CHUNK
    step = max(1, limit * tokens.shape[3] // max(1, tokens.numel()))
    return [slice(first, first + step) for first in range(0, tokens.shape[3], step)]


def frame_sums(tokens: Tensor) -> Tensor:
    """Returns the sum of the tokens of every frame, `(G, T, D)` float64, of `tokens (G, T, P, D)` that are zero where there is none."""
    return torch.cat([tokens[:, some].sum(2, dtype=torch.float64) for some in stretches(tokens)], 1)


def frame_means(frames: Frames) -> Tensor:
    """Returns the mean of the tokens of every frame, `(G, T, D)` float64; zero for a frame without any."""
    return frame_sums(frames.tokens) / frames.real.sum(2).clamp_min(1)[..., None]


def norms(tokens: Tensor) -> Tensor:
    """Returns the Euclidean length of every token, `(G, T, P)` float64."""
    return torch.cat([torch.linalg.vector_norm(tokens[:, some], dim=-1, dtype=torch.float64) for some in stretches(tokens)], 1)


def products(tokens: Tensor, direction: Tensor) -> Tensor:
    """Returns the dot product of every token with the direction of its frame.

    Args:
        tokens: `(G, T, P, D)`.
        direction: `(G, T, D)`, or `(G, 1, D)` for one of the whole video.

    Returns:
        `(G, T, P)` float64. `O(T P D)`; what the machine rounds is far below what `rounded` leaves.
    """
    wide = direction.double().expand(-1, tokens.shape[1], -1)[..., None]
    return torch.cat([(tokens[:, some].double() @ wide[:, some])[..., 0] for some in stretches(tokens)], 1)


def rounded(score: Tensor) -> Tensor:
    """Returns scores to 9 decimals: what is equal but for rounding is a tie, whatever else is in the batch."""
    return score.round(decimals=9)


def cosine_to_frame(tokens: Tensor, real: Tensor, reference: Sequence[int], eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Compares every token with the one at the same place of another frame.

    Args:
        tokens, real: as in `Frames`.
        reference: for each of the T frames the one that it is compared with, -1 for none.
        eps: vectors are taken to be at least that long.

    Returns:
        Cosine `(G, T, P)` float64, `rounded`, and bool `(G, T, P)`: both tokens are there. `O(T P D)` time, memory `CHUNK` numbers at a time.
    """
    groups, count, places, _ = tokens.shape
    wanted = [frame for frame, other in enumerate(reference) if other >= 0]
    cosine, paired = tokens.new_zeros(groups, count, places, dtype=torch.float64), torch.zeros_like(real)
    length, made = norms(tokens).clamp_min(eps), []
    for some in stretches(tokens):
        own = wanted[some]
        if own:
            here, there = _stretch(own), _stretch([reference[frame] for frame in own])
            made.append((tokens[:, here].double() * tokens[:, there].double()).sum(-1) / (length[:, here] * length[:, there]))
            paired[:, here] = real[:, here] & real[:, there]
    if made:
        cosine[:, _stretch(wanted)] = torch.cat(made, 1)
    return rounded(cosine).masked_fill(~paired, 0.0), paired


def _stretch(numbers: Sequence[int]) -> slice | list[int]:
    """Returns consecutive numbers as a slice, which copies nothing."""
    whole = list(range(numbers[0], numbers[-1] + 1)) == list(numbers)
    return slice(numbers[0], numbers[-1] + 1) if whole else list(numbers)


def best_of_frames(score: Tensor, real: Tensor, quota: Tensor) -> Tensor:
    """Keeps in every frame its `quota (G, T)` best of `score (G, T, P)` among `real`; ties go to the lowest place. Mask `(G, T, P)`."""
    return topk_mask(score.flatten(0, 1), real.flatten(0, 1), quota.flatten()).view(real.shape)


def best_of_video(score: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """Keeps in every video its `keep (G,)` best of `score (G, T, P)` among `real`; ties go to the first in time. Mask `(G, T, P)`."""
    return topk_mask(score.flatten(1), real.flatten(1), keep).view(real.shape)


def best_in_order(score: Tensor, tiers: Sequence[Tensor], keep: Tensor) -> Tensor:
    """Keeps the `keep (G,)` best of each video, all of one tier before any of the next.

    Args:
        score: `(G, T, P)`, higher stays.
        tiers: `(G, T, P)` bool each; a token counts for the first that it is in.
        keep: `(G,)` int64.

    Returns:
        Mask `(G, T, P)` bool.
    """
    kept = torch.zeros_like(tiers[0])
    for tier in tiers:
        kept = kept | best_of_video(score, tier & ~kept, keep - kept.sum((1, 2)))
    return kept


def packed_frames(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Brings the frames that have tokens to the front, in order.

    Args:
        values: `(G, T, ...)`.
        present: `(G, T)` bool.

    Returns:
        `values` in the new order, and the place `(G, T)` int64 where each frame is now: `packed.gather(1, place)` undoes it.
    """
    order = (~present).to(torch.uint8).argsort(dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return take(values, order), place
