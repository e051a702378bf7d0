"""What replays of methods for videos share."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.frames import Frames


def frames_of_tokens(tokens: Tensor) -> Frames:
    """Returns the whole tokens `(T, P, D)` of one video as a method sees them."""
    count, places = tokens.shape[:2]
    real = torch.ones(1, count, places, dtype=torch.bool)
    spot = torch.arange(count * places).view(1, count, places)
    return Frames(tokens[None], real, spot, real[..., 0], count * places)
