"""What methods share whose tokens join others: their answer. Not a method."""

from __future__ import annotations

import torch

from vtr.ops.joining import Joined
from vtr.types import Selection, View


def joined(found: Joined, view: View) -> Selection:
    """Returns the Selection of the tokens that are left, in position order, with their values and who joined them.

    Args:
        found: its first `view.keep` pivots of each row are what is left.
        view: of the step.
    """
    width = found.pivot.shape[1]
    real = None if {*view.keeps} == {width} else torch.arange(width, device=view.keep.device) < view.keep[:, None]
    return Selection(index=found.pivot, real=real, tokens=found.values, assign=found.assign)
