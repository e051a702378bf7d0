"""The elbow of a descending curve: the point farthest from the line between its ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Elbow(NamedTuple):
    """`place (G,)` int64 along the sorted curve, `value (G,)` float64 there, `distance (G, N)` float64 of every point from the line, 0 behind it."""

    place: Tensor
    value: Tensor
    distance: Tensor


def elbow(values: Tensor, real: Tensor) -> Elbow:
    """Sorts each row descending and finds the first point farthest (perpendicular, axes unscaled) from the line from first to last.

    Args:
        values: `(G, N)`.
        real: `(G, N)` bool, entries that count; a row without any has place 0 and value inf.

    `O(N log N)` in float64, no host sync.
    """
    curve = values.double().masked_fill(~real, -torch.inf).sort(dim=1, descending=True).values
    count = real.sum(1, keepdim=True)
    at = torch.arange(values.shape[1], device=values.device)
    there = at < count
    first, last = curve[:, :1], curve.gather(1, (count - 1).clamp_min(0))
    line = torch.stack([(count - 1).double().clamp_min(0), torch.where(count > 0, last - first, 0)], -1)  # (G, 1, 2)
    unit = line / torch.linalg.vector_norm(line, dim=-1, keepdim=True).clamp_min(1e-300)
    point = torch.stack([at.double().expand_as(curve), torch.where(there, curve - first, 0)], -1)  # (G, N, 2)
    off = point - (point * unit).sum(-1, keepdim=True) * unit
    distance = torch.where(there, torch.linalg.vector_norm(off, dim=-1), 0)
    place = distance.argmax(1)
    value = torch.where(count[:, 0] > 0, curve.gather(1, place[:, None])[:, 0], torch.inf)
    return Elbow(place, value, distance)
