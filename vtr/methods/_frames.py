"""What methods for videos share: their View frame by frame."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.frames import Frames, by_frame
from vtr.types import Method, Selection, View, VtrError


def frames_of(view: View) -> Frames:
    """Returns the tokens of a View of videos by frame and place in the frame, see `vtr.ops.frames.by_frame`."""
    grids = [view.grid(group) for group in range(len(view.grids))]
    frames = [len(own) for own in view.grids]
    size = view.real.shape[1]
    return by_frame(view.tokens, view.real, view.cells, grids, frames, whole=all(count == size for count in view.counts))


def refuse_authors_counts(method: Method) -> None:
    """Refuses `compat="authors"` on a model for methods whose released code keeps another number than the budget says.

    Raises:
        VtrError: it is set.
    """
    if getattr(method, "compat", None) == "authors":
        raise VtrError(
            f"{method.name}: compat='authors' keeps as many tokens as the released code, which is not what a budget says; it runs in the pure "
            "functions and in scripts/replay only; leave compat out to reduce a model"
        )


def check_compat(method: Method) -> None:
    """Refuses a `compat` that is neither None nor 'authors'.

    Raises:
        ValueError: naming the method.
    """
    compat = getattr(method, "compat", None)
    if compat not in (None, "authors"):
        raise ValueError(f"{method.name}: compat must be None or 'authors', got {compat!r}")


def merged_selection(frames: Frames, keep: Tensor, tokens: Tensor, pivot: Tensor) -> Selection:
    """Returns what a step that merges tokens of videos answers.

    Args:
        frames: what the step saw.
        keep: `(G, T, P)` bool.
        tokens: `(G, T, P, D)`, of which kept ones count.
        pivot: `(G, T, P)` int64 into the `T P` tokens: the kept one that a token was merged into, -1 for none; of kept ones it does not matter.
    """
    spot = frames.spot.flatten(1)
    itself = torch.arange(spot.shape[1], device=spot.device).view(pivot.shape[1:])
    pivot = torch.where(keep, itself, pivot).flatten(1)
    assign = torch.where(pivot >= 0, spot.gather(1, pivot.clamp_min(0)), -1)
    there = frames.flat(frames.real)
    found = frames.flat(assign.view(keep.shape))
    return Selection(keep=frames.flat(keep), tokens=frames.flat(tokens), assign=torch.where(there, found, -1))
