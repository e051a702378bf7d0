"""Tokens of a video linked to similar ones of the frame before, and the means of what hangs together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.frames import CHUNK, Frames, stretches
from vtr.ops.segments import Segments
from vtr.ops.topk import best_of_groups


class Trees(NamedTuple):
    """What every token hangs on, `(G, T P)` each, places among the `T P` tokens of the video.

    `linked` bool: it has a parent. `parent` and `root` int64: of a token that is not linked itself.
    """

    linked: Tensor
    parent: Tensor
    root: Tensor


def trees(frames: Frames, joining: Tensor, parts: Segments, limit: Tensor, threshold: float) -> Trees:
    """Links tokens to the most similar one of the frame before.

    Args:
        frames: tokens of each video; cosines in float32 at least.
        joining: `(G, T, P)` bool, tokens that may be linked and linked to.
        parts: segments, inside which links are made.
        limit: `(G, S)` int64, the most links of each segment; the most similar pairs are linked.
        threshold: cosine that a link has to be above.

    Returns:
        `Trees`. `O(T P^2 D)`, memory `(P, P)` of some frames; roots are found in log T steps. No host sync.
    """
    tokens, (_, count, places) = frames.tokens, joining.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    closest = torch.full(joining.shape, -1.0, dtype=dtype, device=tokens.device)
    parent = torch.zeros_like(frames.spot)
    for some in stretches(tokens):
        first, stop = max(some.start, 1), min(some.stop, count)
        if first < stop:
            child, other = (F.normalize(tokens[:, at].to(dtype), dim=-1) for at in (slice(first, stop), slice(first - 1, stop - 1)))
            same = parts.number[:, first:stop] == parts.number[:, first - 1 : stop - 1]
            may = joining[:, first:stop, :, None] & joining[:, first - 1 : stop - 1, None] & same[..., None, None]
            closest[:, first:stop], parent[:, first:stop] = (child @ other.mT).masked_fill(~may, -1.0).max(3)
    time = torch.arange(count, device=tokens.device)[:, None]
    parent = ((time - 1).clamp_min(0) * places + parent).flatten(1)
    group = parts.number.clamp_min(0)[..., None].expand_as(joining).flatten(1)
    linked = best_of_groups(closest.flatten(1), (joining & (closest > threshold)).flatten(1), group, limit)
    parent = torch.where(linked, parent, torch.arange(parent.shape[1], device=parent.device))
    root = parent
    for _ in range(max(count - 1, 1).bit_length()):
        root = root.gather(1, root)
    return Trees(linked, parent, root)


def means_at(tokens: Tensor, into: Tensor, real: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Averages tokens over what they belong to.

    Args:
        tokens: `(G, N, D)`.
        into: `(G, N)` int64 into N.
        real: `(G, N)` bool, tokens that count.
        divisor: `(G, N)`, what the sum at a place is divided by; default how many tokens belong to it.

    Returns:
        `(G, N, D)` float32 at least, means where something but the token itself belongs to a place and the tokens elsewhere; and how many
        belong there `(G, N)` int64. Sums in float64, some channels at a time.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    size = torch.zeros_like(into).scatter_add_(1, into, real.long())
    by = (size if divisor is None else divisor).clamp_min(1)[..., None]
    step = max(1, CHUNK // max(1, into.numel()))
    made = []
    for part in tokens.split(step, dim=2):
        wide = part.double().masked_fill(~real[..., None], 0.0)
        total = torch.zeros_like(wide).scatter_add_(1, into[..., None].expand_as(wide), wide)
        made.append(torch.where((size > 1)[..., None], (total / by).to(dtype), part.to(dtype)))
    return torch.cat(made, 2), size
