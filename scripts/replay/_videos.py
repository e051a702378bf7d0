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


def authors_peaks(tokens: Tensor, clusters: int, most: int = 7) -> Tensor:
    """Returns the centre of each of `tokens (n, D)` as released codes find it in float32, `(n,)` int64.

    Density is measured by `min(most, clusters)` neighbours. With one or two of these many tokens are equally dense but for rounding, and none of
    them counts as denser, so that rounding decides, which `vtr.ops.density_peaks` does not let it.
    """
    distance = torch.cdist(tokens, tokens) / tokens.shape[1] ** 0.5
    near = distance.topk(min(most, clusters), largest=False).values
    density = (-near.square().mean(1)).exp()
    apart = torch.where(density[None] > density[:, None], distance, distance.max()).amin(1)
    centre = (apart * density).topk(clusters).indices
    own = distance[:, centre].argmin(1)
    own[centre] = torch.arange(clusters)
    return centre[own]
