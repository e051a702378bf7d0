"""QuoTA's parts: how many tokens each frame gets, and what stands at them. Not a method.

`scores (T,)` are the relevance of frames, 0 to 1. The released code has three ways to make a frame smaller that run: v1 interpolates without a
cap, v2 pools and v3 picks tokens, both below a cap of the frame's own tokens, which loses weight that it does not hand on.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vtr.ops.frames import Frames
from vtr.ops.gather import take
from vtr.ops.topk import quota, topk_mask

Version = Literal["v1", "v2", "v3"]


def frame_weights(scores: Tensor, present: Tensor, exponent: float = 2.0) -> Tensor:
    """Weights of frames.

    Args:
        scores: `(G, T)`, not negative; NaN counts as 0.
        present: `(G, T)` bool, frames that count.
        exponent: of the score.

    Returns:
        `(G, T)` float64 with row sums 1; the same for all frames that count where every score is 0.
    """
    value = torch.where(present, scores.double().nan_to_num(0.0).clamp_min(0), 0)
    value = value / value.amax(1, keepdim=True).clamp_min(1e-300)  # no power of a small number is lost
    value = torch.where((value > 0).any(1, keepdim=True), value, present.double()) ** exponent * present
    return value / value.sum(1, keepdim=True).clamp_min(1e-300)


def frame_quotas(scores: Tensor, count: Tensor, keep: Tensor, exponent: float = 2.0) -> Tensor:
    """Shares a budget over frames, `(G, T)` int64 with row sums `keep`: by weight and largest remainder, none above its own `count (G, T)`.

    What a full frame cannot take goes to the others in proportion to their weights, and in the end to those without weight.
    """
    return quota(frame_weights(scores, count > 0, exponent), count, keep)


class Shrunk(NamedTuple):
    """How frames are cut into cells.

    `pivot (G, T, P)` bool: tokens at the center of a cell. `cell (G, T, P)` int64: the pivot of the cell that each token lies in, a place in the
    frame. `near (G, T, P)` bool: its value is part of what stands there. `row` and `col (G, T, P)` float32: that center in token coordinates.
    """

    pivot: Tensor
    cell: Tensor
    near: Tensor
    row: Tensor
    col: Tensor


def shrunk(share: Tensor, sides: Tensor, places: int) -> Shrunk:
    """Cuts frames into as many cells as they get tokens.

    A frame of R x C with n tokens has sqrt(n R / C) rows of cells, to the nearest; what of n they do not hold evenly makes some rows one cell wider.

    Args:
        share: `(G, T)` int64 n, at most R C.
        sides: `(G, 2)` int64 R and C.
        places: P, the most places of a frame.
    """
    height, width = (sides[:, None, None, i] for i in (0, 1))  # (G, 1, 1)
    n = share[..., None]
    some = n.clamp_min(1)
    rows = ((some * height / width).double() + 0.25).sqrt().add(0.5).floor().long()
    rows = rows.maximum(-(-some // width)).minimum(height).minimum(some)
    at = torch.arange(places, device=share.device)
    own_row, own_col = at // width, at % width  # (G, 1, P)
    band = ((2 * own_row + 1) * rows // (2 * height)).minimum(rows - 1)
    across = (band + 1) * some // rows - band * some // rows
    place = ((2 * own_col + 1) * across // (2 * width)).minimum(across - 1)
    row, col = (2 * band + 1) * height / (2 * rows) - 0.5, (2 * place + 1) * width / (2 * across) - 0.5
    center = (2 * band + 1) * height // (2 * rows) * width + (2 * place + 1) * width // (2 * across)
    near = ((own_row - row).abs() < 1) & ((own_col - col).abs() < 1)
    inside = (at < height * width) & (n > 0)
    return Shrunk(inside & (center == at), center, near & inside, row.float(), col.float())


class Resized(NamedTuple):
    """`keep (G, T, P)` bool; `assign (G, T, P)` int64, the place in its frame of the token that each went into, -1 for none; `made (G, T, P)` bool,
    kept tokens with an interpolated value, at `row` and `col (G, T, P)`."""

    keep: Tensor
    assign: Tensor
    made: Tensor
    row: Tensor
    col: Tensor


def resized_frames(real: Tensor, share: Tensor, sides: Tensor) -> Resized:
    """Chooses the tokens of smaller frames.

    Args:
        real: `(G, T, P)` bool.
        share: `(G, T)` int64, at most the real tokens of each frame.
        sides: `(G, 2)` int64 rows and columns of a frame.

    Returns:
        The choice, with exactly `share` kept per frame: tokens at the centers of cells; where some of these are gone, the first others. A
        frame that keeps all its tokens is left as it is.
    """
    places = real.shape[2]
    cut = shrunk(share, sides, places)
    whole = share == real.sum(2)
    pivot = cut.pivot & real & ~whole[..., None]
    keep = topk_mask(pivot.flatten(0, 1).float(), real.flatten(0, 1), share.flatten()).view_as(real)
    at = torch.arange(places, device=real.device).expand_as(real)
    there = pivot.gather(2, cut.cell.clamp_max(places - 1)) & cut.near & real
    assign = torch.where(keep, at, torch.where(there, cut.cell, -1))
    return Resized(keep, assign, pivot, cut.row, cut.col)


def interpolated(frames: Frames, sides: Tensor, token: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Returns bilinear values of frames.

    Args:
        frames: tokens of each video by frame and place.
        sides: `(G, 2)` int64 rows and columns of a frame.
        token: `(G, K)` int64 into `T P`, tokens whose frames are meant.
        row, col: `(G, K)` in token coordinates.

    Returns:
        `(G, K, D)` float32 at least; weights are those of the tokens that are there.
    """
    tokens = frames.tokens.flatten(1, 2)
    dtype, real = torch.promote_types(tokens.dtype, torch.float32), frames.real.flatten(1)
    width, first = sides[:, 1:], token - token % frames.tokens.shape[2]
    (top, low, down), (left, right, across) = (_between(at, sides[:, i : i + 1]) for i, at in enumerate((row, col)))
    total, weights = torch.zeros(*token.shape, tokens.shape[2], dtype=dtype, device=tokens.device), torch.zeros_like(row)
    for y, x, weight in (
        (top, left, (1 - down) * (1 - across)),
        (top, right, (1 - down) * across),
        (low, left, down * (1 - across)),
        (low, right, down * across),
    ):
        corner = (first + y * width + x).clamp(0, real.shape[1] - 1)
        weight = weight * real.gather(1, corner)
        total += weight[..., None] * take(tokens, corner)
        weights += weight
    return total / torch.where(weights > 0, weights, 1)[..., None]


def _between(at: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the two places beside `at` on a line of `length`, and the weight of the second."""
    at = at.clamp_min(0).minimum((length - 1).to(at.dtype))
    first = at.floor().long()
    return first, (first + 1).minimum(length - 1), at - first


def authors_weights(scores: Tensor, exponent: float = 2.0, cap: float | None = None) -> Tensor:
    """Returns the weights `(T,)` float64 of the released code.

    What is above the cap is handed out once, in time order and in proportion to the weights after capping, the capped ones among them; what a frame
    then has above the cap goes to those behind it. The rest is lost.
    """
    weight = frame_weights(scores[None], torch.ones_like(scores, dtype=torch.bool)[None], exponent)[0]
    if cap is None or not bool((weight > cap).any()):
        return weight
    own = weight.clamp_max(cap).tolist()
    extra, whole, found = float((weight - cap).clamp_min(0).sum()), sum(own), []
    for value in own:
        made = value if value >= cap else value + extra * value / whole
        extra += max(made - cap, 0)
        found.append(min(made, cap))
    return torch.tensor(found, dtype=torch.float64)


def authors_budgets(weights: Tensor, total: int) -> Tensor:
    """Returns the tokens `(T,)` int64 of each frame in the released code, rounded down."""
    return (weights * total).long()


def authors_grid(count: int) -> tuple[int, int]:
    """Returns the grid that the released code makes of `count` tokens, (0, 0) where it drops the frame."""
    side = math.isqrt(max(count, 0))
    return (side + 1, side) if 0 < side * (side + 1) <= count else (side, side)


def authors_frames(tokens: Tensor, budgets: list[int], version: Version) -> list[Tensor]:
    """Returns the tokens `(n, D)` of each frame in the released code, `(h, w, D)` for v1 and v2.

    Args:
        tokens: `(T, R, C, D)`.
        budgets: of each frame.
        version: v1 interpolates, v2 pools, v3 takes evenly spaced tokens.
    """
    found = []
    for frame, budget in zip(tokens, budgets, strict=True):
        if version == "v3":
            flat = frame.flatten(0, 1)
            found.append(flat[torch.linspace(0, len(flat) - 1, max(budget, 0), device=flat.device).long()])
            continue
        grid, planes = authors_grid(budget), rearrange(frame, "r c d -> 1 d r c")
        if not grid[0]:
            found.append(frame[:0, :0])
            continue
        small = F.interpolate(planes, size=grid, mode="bilinear") if version == "v1" else F.adaptive_avg_pool2d(planes, grid)
        found.append(rearrange(small, "1 d r c -> r c d"))
    return found
