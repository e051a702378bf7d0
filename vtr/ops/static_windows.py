"""Stretches of a video in which many places stay the same, found by dynamic programming."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """A video cut into windows of consecutive frames.

    Args:
        start, last: `(G, T)` int64, first and last frame of each frame's window.
        static: `(G, T, P)` bool, tokens at places that stay the same through the whole window, which has several frames then.
        gain: `(G,)` int64, static tokens that are not in the first frame of their window: what merging them saves.
    """

    start: Tensor
    last: Tensor
    static: Tensor
    gain: Tensor


def static_windows(close: Tensor, there: Tensor, longest: int = 1024) -> Windows:
    """Cuts videos into windows so that merging what is static in each saves the most tokens.

    A window from s to e saves (e - s) tokens at every place where each of its frames is close to the frame before. Of equally good windows
    that end at a frame the shortest is taken.

    Args:
        close: `(G, T, P)` bool, the token is there and close to the one at its place of the frame before; False for the first frame.
        there: `(G, T)` bool, frames of the video, in front.
        longest: frames that a window may have.

    Returns:
        `Windows`; frames behind a video are windows of one. Two loops over the T frames on rows of at most T numbers per video, which each need
        the one before; `O(T^2 + T P)`, no host sync.
    """
    groups, frames, _ = close.shape
    time = torch.arange(frames, device=close.device)
    run = time[:, None] - torch.where(close, 0, time[:, None]).cummax(1).values  # (G, T, P): how many frames back it is the same
    exactly = torch.zeros(groups, frames, frames, dtype=torch.int64, device=close.device).scatter_add_(2, run, torch.ones_like(run))
    gain = exactly.flip(2).cumsum(2).flip(2) * time  # (G, T, length - 1) of a window that ends at T
    gain = gain.masked_fill(time >= longest, -1)

    best = torch.zeros(groups, frames + 1, dtype=torch.int64, device=close.device)  # of the frames in front of one
    back = torch.zeros(groups, frames, dtype=torch.int64, device=close.device)
    for end in range(frames):
        options = torch.cat([best[:, end : end + 1], best[:, :end].flip(1) + gain[:, end, 1 : end + 1]], 1)
        best[:, end + 1], back[:, end] = options.max(1)

    count = there.sum(1)
    ends = torch.zeros(groups, frames + 1, dtype=torch.bool, device=close.device)  # the last column is for frames that end nothing
    ends.scatter_(1, (count - 1)[:, None] % (frames + 1), True)
    for end in reversed(range(frames)):
        before = end - back[:, end] - 1
        ends.scatter_(1, torch.where(ends[:, end] & (before >= 0), before, frames)[:, None], True)
    is_last = ends[:, :frames] | ~there
    is_first = torch.cat([torch.ones_like(is_last[:, :1]), is_last[:, :-1]], 1)
    start = torch.where(is_first, time, 0).cummax(1).values
    last = torch.where(is_last, time, frames).flip(1).cummin(1).values.flip(1).clamp_max(frames - 1)
    through = run.gather(1, last[..., None].expand_as(run)) >= (last - start)[..., None]
    static = through & (last > start)[..., None]
    return Windows(start, last, static, (static & (time > start)[..., None]).sum((1, 2)))
