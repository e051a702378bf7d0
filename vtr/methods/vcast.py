"""V-CAST: give frames tokens by how sharply the video turns there, and keep the tokens of a frame that stand out.

Paper: Lin et al., 2026, arXiv 2603.27650.
Code:  github.com/xinyouu/V-CAST at c235ef3 (no licence of its own for the method's folder): nothing copied, checked against its outputs.
Stage: boundary. Reads: visual tokens. Batch: any. Deterministic: yes.

1. A frame is described by the direction f_t of the mean of its tokens.
2. Its curvature is 1 - cos(f_t - f_{t-1}, f_{t+1} - f_t); that of the first and the last frame is 1.
3. Every frame gets one token; the others are shared in proportion to softmax(curvature / 0.7), never above the frame's own tokens.
4. A token scores 1 - cos(token, f_t) plus its Euclidean norm, scaled to 0 .. 1 over the frame. The best of each frame stay.

Paper to code: r -> keep_ratio, tau -> temperature, min_k -> least.
Departures: remainders go to the largest fractions, one per frame, where the code gives the frame with the largest fraction everything that is
left until it is full (`compat="authors"`); a budget below one token per frame is possible; a single frame is reduced as well. Frames that an
earlier method emptied are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods._frames import frames_of
from vtr.ops.frames import Frames, best_of_frames, frame_means, norms, packed_frames, products, rounded
from vtr.ops.topk import quota
from vtr.registry import register_method
from vtr.types import VIDEO, Boundary, Budget, Card, Geometry, Method, Remove, Selection, Stage, Step, View, at_least, check_choices

EPS = 1e-6


def curvature(direction: Tensor, present: Tensor) -> Tensor:
    """How sharply a video turns at each frame, from 0 to 2.

    Args:
        direction: `(G, T, D)` descriptors of unit length.
        present: `(G, T)` bool, frames that count.

    Returns:
        `(G, T)`; 1 for the first and the last frame that count, and for those that do not.
    """
    packed, place = packed_frames(direction, present)
    step = packed.diff(dim=1)
    turn = 1 - F.cosine_similarity(step[:, :-1], step[:, 1:], dim=-1, eps=EPS)
    turn = F.pad(turn, (1, 1), value=1.0)[:, : packed.shape[1]]  # one frame has no step, and no turn
    last = place.masked_fill(~present, 0).amax(1, keepdim=True)
    turn = torch.where(torch.arange(turn.shape[1], device=turn.device) >= last, 1.0, turn)
    return turn.gather(1, place)


def shared_by_loop(base: Tensor, weight: Tensor, room: Tensor, rest: Tensor) -> Tensor:
    """Shares out as the released code: whole parts first, then everything left to the largest fraction until that frame is full.

    Args:
        base: `(G, T)` int64, what each frame has already.
        weight: `(G, T)`, with sum 1.
        room: `(G, T)` int64, what a frame can take besides.
        rest: `(G,)` int64, to be shared out.
    """
    wanted = weight * rest[:, None]
    extra = wanted.floor().long().minimum(room)
    left = rest - extra.sum(1)
    order = (wanted - wanted.floor()).argsort(dim=1, descending=True, stable=True)
    free = (room - extra).gather(1, order)
    given = (left[:, None] - free.cumsum(1) + free).clamp_min(0).minimum(free)
    return base + extra + torch.zeros_like(extra).scatter(1, order, given)


def frame_budgets(turn: Tensor, count: Tensor, keep: Tensor, temperature: float = 0.7, least: int = 1, loop: bool = False) -> Tensor:
    """Shares a budget over frames by their curvature.

    Args:
        turn: `(G, T)`, see `curvature`.
        count: `(G, T)` int64, tokens of each frame.
        keep: `(G,)` int64.
        temperature: of the softmax; higher is more even.
        least: tokens that every frame gets, where the budget has so many.
        loop: share remainders out as the released code.

    Returns:
        `(G, T)` int64 with row sums `keep`.
    """
    present = count > 0
    base = (keep // present.sum(1).clamp_min(1)).clamp_max(least)[:, None].minimum(count)
    weight = (turn / temperature).masked_fill(~present, -torch.inf).softmax(1).nan_to_num(0.0)
    rest = keep - base.sum(1)
    if loop:
        return shared_by_loop(base, weight, count - base, rest)
    return base + quota(weight, count - base, rest)


def standing_out(frames: Frames, direction: Tensor) -> Tensor:
    """Score `(G, T, P)` of each token: its distance from the direction `(G, T, D)` of its frame, and its length against others of the frame."""
    norm = norms(frames.tokens)
    length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    cosine = products(frames.tokens, direction) / (norm.clamp_min(EPS) * length.clamp_min(EPS))
    lowest = norm.masked_fill(~frames.real, torch.inf).amin(2, keepdim=True)
    highest = norm.masked_fill(~frames.real, -torch.inf).amax(2, keepdim=True)
    return rounded(1 - cosine + (norm - lowest) / (highest - lowest + EPS))


def vcast(frames: Frames, keep: Tensor, temperature: float = 0.7, least: int = 1, loop: bool = False) -> Tensor:
    """Keeps the tokens that stand out in their frame, more of frames where the video turns.

    Args:
        frames: tokens of each video by frame and place; computed in float64.
        keep: `(G,)` int64, at most the real tokens of the video.
        temperature, least, loop: see `frame_budgets`.

    Returns:
        Keep mask `(G, T, P)` bool with exactly `keep` True per row; ties go to the lowest index. `O(T P D)`, no host sync.
    """
    direction = F.normalize(frame_means(frames), dim=-1, eps=EPS)
    count = frames.real.sum(2)
    share = frame_budgets(curvature(direction, count > 0), count, keep, temperature, least, loop)
    return best_of_frames(standing_out(frames, direction), frames.real, share)


@register_method("vcast")
@dataclass(frozen=True, kw_only=True)
class VCast(Method):
    """The default is the paper's 25 %; positions are kept."""

    temperature: float = 0.7
    least: int = 1
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.25)
    card: ClassVar[Card] = Card(
        title="V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language Models",
        paper="Lin et al., 2026",
        arxiv="2603.27650",
        code="github.com/xinyouu/V-CAST",
        cost="frame means and one cosine per token, O(N D)",
        needs_video=True,
        settings={
            "temperature": "of the softmax over curvatures; higher shares tokens more evenly over frames",
            "least": "tokens that every frame keeps, where the budget has so many",
            "compat": "'authors': remainders as the released code hands them out; the total is the same",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)
        at_least(self, "least", 0)
        if not self.temperature > 0:
            raise ValueError(f"vcast: temperature must be above 0, got {self.temperature}; the authors use 0.7")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Remove(Boundary(), self._select, on=VIDEO),)

    def _select(self, view: View) -> Selection:
        frames = frames_of(view)
        return Selection(keep=frames.flat(vcast(frames, view.keep, self.temperature, self.least, loop=self.compat is not None)))
