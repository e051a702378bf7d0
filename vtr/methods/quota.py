"""QuoTA: share a budget over frames by how much each has to do with the question, and shrink each frame to its share.

Paper: Luo et al., AAAI 2026, arXiv 2503.08689.
Code:  github.com/MAC-AutoML/QuoTA at ec194d7 (no licence): nothing copied, checked against its outputs.
Stage: boundary. Reads: visual tokens, and the relevance of frames that the caller gives. Batch: any. Deterministic: yes.

1. The caller scores every frame, 0 to 1 (`frame_scores=`); the authors ask a second model whether the frame shows what the question is about.
2. A frame's share of the budget is in proportion to its score squared, by largest remainder, and never above the frame's own tokens; what it
   cannot take goes to the others by their weights.
3. A frame of n tokens is resized to about sqrt(n) rows and columns, by bilinear interpolation. The values stand at the tokens nearest to the
   centers of the new cells.

Paper to code: weight scale (100, 2) -> exponent (100 cancels out), total -> keep.
Departures: the budget is met exactly. The authors round shares down, shrink to the rectangle s x s or (s + 1) x s below and leave a few percent
unused; here the rows of cells are as theirs and share all n tokens out, so that some rows are one cell wider, and where n is s x s the values
are the same. The authors let a frame grow above its own size (v1) or lose what it cannot take (v2, v3: pooling, picking tokens); these run in
the pure functions and in scripts/replay only. Frames of another shape are shrunk alike in both directions. If every score is 0, all frames weigh
the same, where the code stops with an error. Where an earlier method removed tokens, values are interpolated between those that are there, and
a cell whose center is gone gives way to the first token of the frame that is nobody's.
Frame sampling and the list of objects are the caller's: this is not the whole method. `vtr.FrameScorer` asks the second model; the cost lies there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.methods._frames import frames_of, merged_assign, refuse_authors
from vtr.methods._quota import frame_quotas, interpolated, resized_frames
from vtr.ops.canvas import on_device
from vtr.ops.frames import Frames
from vtr.ops.gather import compaction, take
from vtr.registry import register_method
from vtr.types import VIDEO, Boundary, Budget, Card, Geometry, Merge, Method, PositionOption, Selection, Stage, Step, View, check_choices
from vtr.types.signals import frame_score


def quota_frames(
    frames: Frames, sides: Tensor, scores: Tensor, keep: Tensor, most: int, exponent: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrinks the frames of videos by their scores.

    Args:
        frames: tokens of each video by frame and place; interpolated in float32 at least.
        sides: `(G, 2)` int64 rows and columns of a frame.
        scores: `(G, T)`, not negative.
        keep: `(G,)` int64, at most the real tokens of the video.
        most: `keep.max()` as a Python int.
        exponent: of the score.

    Returns:
        Keep mask `(G, N)` bool over the tokens of the View, their values `(G, most, D)` in order, filled up in front, and `assign (G, N)` int64.
        `O(N + keep D)`, no host sync.
    """
    places = frames.real.shape[2]
    found = resized_frames(frames.real, frame_quotas(scores, frames.real.sum(2), keep, exponent), sides)
    token = torch.arange(frames.real[0].numel(), device=keep.device).view(1, -1, places)
    spot, _ = compaction(found.keep.flatten(1), most)  # (G, K) into T P, in time order, then raster
    values = interpolated(frames, sides, spot, *(at.flatten(1).gather(1, spot) for at in (found.row, found.col)))
    made = found.made.flatten(1).gather(1, spot)[..., None]
    values = torch.where(made, values, take(frames.tokens.flatten(1, 2), spot))
    pivot = torch.where(found.assign >= 0, token - token % places + found.assign, -1)
    return frames.flat(found.keep), values, merged_assign(frames, found.keep, pivot)


@register_method("quota")
@dataclass(frozen=True, kw_only=True)
class QuoTA(Method):
    """The default is a quarter, as no budget of the paper is a share of a video's tokens; positions are renumbered as the authors do."""

    exponent: float = 2.0
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.25)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension",
        paper="Luo et al., 2026",
        venue="AAAI 2026",
        arxiv="2503.08689",
        code="github.com/MAC-AutoML/QuoTA (no licence, not used)",
        signals="visual tokens; relevance of frames, given by the caller (frame_scores=)",
        cost="interpolation, O(keep D); scoring every frame by a second model is the caller's and costs far more",
        needs_video=True,
        needs_frame_scores=True,
        experimental=True,
        settings={
            "exponent": "of the scores; higher gives more to the most relevant frames",
            "compat": "'authors': shares rounded down, without a cap; pure functions and replay only, as a prompt has no places for larger frames",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)
        if not self.exponent >= 0:
            raise ValueError(f"quota: exponent must be at least 0, got {self.exponent}; the authors use 2")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        refuse_authors(self, "the released code makes frames larger than they are, for which a prompt has no places")
        return (Merge(Boundary(), self._select, (frame_score(),), on=VIDEO),)

    def _select(self, view: View) -> Selection:
        frames = frames_of(view)
        sides = on_device([view.grid(group) for group in range(len(view.grids))], view.tokens.device)
        keep, values, assign = quota_frames(frames, sides, view.signals[frame_score()], view.keep, view.most, self.exponent)
        index, real = compaction(keep, view.most)
        values = torch.where(real[..., None], values.to(view.tokens.dtype), take(view.tokens, index))
        tokens = view.tokens.scatter(1, index[..., None].expand_as(values), values)
        return Selection(keep=keep, tokens=tokens, assign=assign)
