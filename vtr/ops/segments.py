"""Videos cut into segments where neighbouring frames differ."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.frames import packed_frames, rounded
from vtr.ops.topk import topk_mask


class Segments(NamedTuple):
    """What segment each frame is in, `(G, T)` int64 each; frames that do not count are in segment -1, of length 0.

    `number` counts from 0; `length` is that of the segment; `behind` is the number of frames of the segment behind the frame.
    """

    number: Tensor
    length: Tensor
    behind: Tensor


def segments(direction: Tensor, present: Tensor, threshold: float, least: int) -> Segments:
    """Cuts between neighbouring frames whose cosine is below a threshold, and where that makes too few segments at the lowest other ones.

    Args:
        direction: `(G, T, D)`, what describes each frame.
        present: `(G, T)` bool, frames that count; others are skipped.
        threshold: of the cosine.
        least: segments that a video is to have, where it has so many frames.

    Returns:
        `Segments`; ties go to the first in time. `O(T D)`, no host sync.
    """
    packed, place = packed_frames(direction.double(), present)
    frames, count = present.shape[1], present.sum(1, keepdim=True)
    time = torch.arange(frames, device=present.device)
    cosine = rounded(F.cosine_similarity(packed[:, :-1], packed[:, 1:], dim=-1, eps=1e-8))
    pair = time[:-1] < count - 1
    cut = pair & ((cosine < threshold) | topk_mask(-cosine, pair, (count[:, 0] - 1).clamp(0, least - 1)))
    number = F.pad(cut.long().cumsum(1), (1, 0))
    number = torch.where(time < count, number, frames)
    size = torch.zeros(len(number), frames + 1, dtype=torch.int64, device=number.device).scatter_add_(1, number, torch.ones_like(number))
    behind = size.cumsum(1).gather(1, number) - 1 - time
    length = size.gather(1, number)
    gone = ~present
    number, length, behind = (values.gather(1, place).masked_fill(gone, fill) for values, fill in ((number, -1), (length, 0), (behind, 0)))
    return Segments(number, length, behind)
