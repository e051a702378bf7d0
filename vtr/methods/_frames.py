"""What methods for videos share: their View frame by frame."""

from __future__ import annotations

from vtr.ops.frames import Frames, by_frame
from vtr.types import View


def frames_of(view: View) -> Frames:
    """Returns the tokens of a View of videos by frame and place in the frame, see `vtr.ops.frames.by_frame`."""
    grids = [view.grid(group) for group in range(len(view.grids))]
    frames = [len(own) for own in view.grids]
    size = view.real.shape[1]
    return by_frame(view.tokens, view.real, view.cells, grids, frames, whole=all(count == size for count in view.counts))
