"""The relevance of frames that a caller gives, for methods that share a budget out by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vtr.types import VtrError

Scores = Tensor | Sequence[Tensor] | Sequence[Sequence[float]]
FrameScores = Scores | Callable[[list[int]], Scores]
"""One row of scores per video, in the order of the prompts; or a function of the frames of every video that returns them."""


def scores_of(given: FrameScores, frames: list[int], source: list[int], device: torch.device) -> Tensor:
    """Returns the scores `(G, T)` float32 of the videos that a step sees, 0 behind the frames of a shorter one.

    Args:
        given: what the caller gave.
        frames: of every video of the prompts.
        source: which of them each row is.
        device: of the result.

    Raises:
        VtrError: other videos, or other frames, than the prompts have.
    """
    rows = [torch.as_tensor(row).float().flatten() for row in (given(frames) if callable(given) else given)]
    if [len(row) for row in rows] != frames:
        raise VtrError(
            f"vtr: frame_scores must hold one score for every frame of every video, here {frames} frames, got {[len(row) for row in rows]}; a video "
            "whose frames the model puts together in twos has half as many (joined(2) of what FrameScorer returned)"
        )
    return torch.nn.utils.rnn.pad_sequence([rows[i].to(device) for i in source], batch_first=True)
