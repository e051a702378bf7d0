"""Frames: keep whole frames, evenly spaced in time.

Paper: none; ours. What a budget buys without any method: fewer frames.
Stage: boundary. Reads: nothing. Batch: any. Deterministic: yes.

1. As few frames as hold `keep` tokens are chosen: of T frames those at floor((i + 1/2) T / n), i = 0 .. n - 1.
2. They stay whole but for the last, which keeps what is left of the budget, evenly spaced in raster order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods._frames import frames_of
from vtr.ops.spaced import evenly_spaced
from vtr.registry import register_method
from vtr.types import VIDEO, Boundary, Budget, Card, Geometry, Method, Remove, Selection, Stage, Step, View


def whole_frames(real: Tensor, keep: Tensor) -> Tensor:
    """Keeps as few whole frames, evenly spaced in time, as hold a budget.

    Args:
        real: `(G, T, P)` bool; frames without tokens do not count.
        keep: `(G,)` int64, at most `real.sum((1, 2))`.

    Returns:
        Keep mask `(G, T, P)` bool with exactly `keep` True per row. `O(T^2 + T P)`, no host sync.
    """
    count = real.sum(2)  # (G, T)
    present = count > 0
    number = torch.arange(1, real.shape[1] + 1, device=real.device)  # of frames
    choices = evenly_spaced(present[:, None].expand(-1, len(number), -1), number.expand(len(real), -1))  # (G, number, T)
    enough = (choices * count[:, None]).sum(2) >= keep[:, None]
    chosen = choices[torch.arange(len(real), device=real.device), enough.to(torch.uint8).argmax(1)]
    room = torch.where(chosen, count, 0)
    return evenly_spaced(real, (keep[:, None] - room.cumsum(1) + room).clamp_min(0).minimum(room))


@register_method("frames")
@dataclass(frozen=True, kw_only=True)
class WholeFrames(Method):
    """Evenly spaced frames at the boundary; the default budget is a quarter, the most usual of tables of video methods."""

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.25)
    card: ClassVar[Card] = Card(
        title="Frames: fewer frames, evenly spaced",
        paper="none (reference row)",
        signals="nothing",
        cost="O(N), no arithmetic on tokens",
        needs_video=True,
        ours=True,
    )

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Remove(Boundary(), _select, on=VIDEO),)


def _select(view: View) -> Selection:
    frames = frames_of(view)
    return Selection(keep=frames.flat(whole_frames(frames.real, view.keep)))
