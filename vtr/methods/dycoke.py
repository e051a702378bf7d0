"""DyCoke: of four frames keep one whole, and of the others what changed.

Paper: Tao et al., CVPR 2025, arXiv 2411.15024.
Code:  github.com/KD-TAO/DyCoke at dd74634, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary; with `decode` also decode. Reads: visual tokens; an attention row. Batch: any. Deterministic: yes.

1. Frames are taken four at a time. The first is kept whole.
2. The second and the third keep the tokens that are least like the one at the same place of the first, by cosine; the fourth those least like
   that of the third. What is dropped is not merged into anything, whatever the paper's name for it.
3. What the whole frames leave of the budget is shared equally by the others.
4. With `decode`: for every new token, in front of LLM layer L, its attention to the visual tokens in layer L - 1 (mean over heads) is compared
   with that of the token before. Where the cosine is below 0.9, the layers from L on attend to the share 1 - p of the visual tokens that get
   most; else to all of them. The KV cache stays whole: this saves time, not memory.

Paper to code: K -> 1 minus the share that step 3 leaves of a reduced frame (0.7 is keep_ratio = 0.475), P -> pruned, L -> layer. Steps 1 to 3
are the authors' TTM, step 4 is DP. The paper's final ratios multiply both; what the prompt keeps is K's alone.
Departures: the third frame of the last four is reduced as well, a frame or two that are left over at the end are kept or reduced like any
others, four frames or fewer work, and tokens keep their order in the frame, where the code leaves out the third frame's reduction at the end,
drops an odd last frame, stops with an error and orders by likeness (`compat="authors"`). A budget below the whole frames, which the code
cannot express, drops the reduced frames and then reduces the whole ones equally: by their likeness to the whole frame before, the first to
evenly spaced tokens. Where an earlier method removed the token to compare with, a token counts as new. Step 4 is off unless asked for (the
documented command of the authors did not run it either), starts anew with every prompt, counts all visual tokens, where the code counts one
less, and leaves at least one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vtr.methods._frames import authors_ratio, frames_of, order_by
from vtr.ops.canvas import on_device
from vtr.ops.frames import best_of_frames, cosine_to_frame
from vtr.ops.spaced import evenly_spaced
from vtr.ops.topk import quota, topk_mask
from vtr.registry import register_method
from vtr.types import (
    VIDEO,
    Attend,
    Boundary,
    Budget,
    Card,
    Decode,
    Geometry,
    Method,
    PositionOption,
    Remove,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    VtrError,
    at_least,
    check_choices,
    check_llm_layer,
)
from vtr.types.signals import attention

WINDOW = 4
BACK = (4, 1, 2, 1)
"""How many frames in front of it is the frame that each of a window is compared with; of the first that of the window before."""


def frame_budgets(count: Tensor, keep: Tensor) -> Tensor:
    """Shares a budget over frames: the first of each four whole, the others alike.

    Args:
        count: `(G, T)` int64, tokens of each frame.
        keep: `(G,)` int64, at most `count.sum(1)`.

    Returns:
        `(G, T)` int64 with row sums `keep`.
    """
    whole = (torch.arange(count.shape[1], device=count.device) % WINDOW == 0).expand_as(count)
    first = torch.where(whole, count, 0)
    few = keep.minimum(first.sum(1))
    return quota(first.double(), first, few) + quota(torch.where(whole, 0, count).double(), count - first, keep - few)


def dycoke(tokens: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """Keeps one of four frames, and of the others what is least like it.

    Args:
        tokens: `(G, T, P, D)`, one video per row, any float dtype; cosines in float64.
        real: `(G, T, P)` bool.
        keep: `(G,)` int64, at most `real.sum((1, 2))`.

    Returns:
        Keep mask `(G, T, P)` bool with exactly `keep` True per row; ties go to the lowest place. `O(T P D)`, no host sync.
    """
    cosine, paired = cosine_to_frame(tokens, real, [max(t - BACK[t % WINDOW], -1) for t in range(tokens.shape[1])])
    share = frame_budgets(real.sum(2), keep)
    new = real & ~paired  # nothing to compare with: first of all, evenly spaced where not all of them can stay
    spaced = evenly_spaced(new, share.minimum(new.sum(2)))
    return spaced | best_of_frames(-cosine, paired, share - spaced.sum(2))


def dycoke_authors(tokens: Tensor, real: Tensor, frames: Sequence[int], pruned: float) -> tuple[Tensor, Tensor]:
    """Returns what the released code keeps of videos, in its order.

    Args:
        tokens: `(G, T, P, D)`, one video per row.
        real: `(G, T, P)` bool.
        frames: of each video, on the host; more than four.
        pruned: k, the share of a reduced frame that is dropped.

    Returns:
        Order `(G, T P)` int64, kept tokens in front, and keep mask `(G, T, P)` bool. `O(T P D)`, no host sync.

    Raises:
        VtrError: four frames or fewer.
    """
    count = tokens.shape[1]
    if min(frames) <= WINDOW:
        raise VtrError(
            f"dycoke: compat='authors' needs more than {WINDOW} frames, as the released code does, got {min(frames)}; leave compat out"
        )
    cosine, _ = cosine_to_frame(tokens, real, [t - BACK[t % WINDOW] if t % WINDOW else -1 for t in range(count)])
    # the third frame of the last window is whole, and an odd last frame is lost
    unpaired = [[t % WINDOW == 0 or (t % WINDOW == 2 and t - 2 >= own - WINDOW) for t in range(count)] for own in frames]
    paired = [[t < own - own % 2 for t in range(count)] for own in frames]
    whole, there = (on_device(flags, tokens.device).bool()[..., None] for flags in (unpaired, paired))
    own = real & there
    left = (real.sum(2).double() * (1 - pruned)).long()  # as it is there: 0.9 of 10 leaves none, as 1 - 0.9 is below 0.1
    kept = torch.where(whole, own, best_of_frames(-cosine, own & ~whole, torch.where(whole[..., 0], 0, left)))
    time = torch.arange(count, device=tokens.device)[:, None].expand_as(real)
    rank = torch.where(whole, 0.0, cosine)
    return order_by(kept.flatten(1), time.expand_as(real).flatten(1), rank.flatten(1)), kept


def attended(row: Tensor, before: Tensor | None, real: Tensor, keep: Tensor, threshold: float = 0.9) -> tuple[Tensor, Tensor]:
    """Which visual tokens the later layers attend to for one new token.

    Args:
        row: `(G, N)` attention that the new token pays to them, mean over heads.
        before: that of the token before it; None for the first.
        real: `(G, N)` bool.
        keep: `(G,)` int64, tokens attended to where attention has moved.
        threshold: cosine from which on attention has not moved.

    Returns:
        Mask `(G, N)` bool, all real tokens where attention has not moved, and the cosine `(G,)`, 0 for the first token.
    """
    row = row.float() * real
    similarity = row.new_zeros(len(row)) if before is None else F.cosine_similarity(row, before.float() * real, dim=1)
    return torch.where(similarity[:, None] < threshold, topk_mask(row, real, keep), real), similarity


@register_method("dycoke")
@dataclass(frozen=True, kw_only=True)
class DyCoke(Method):
    """The default is K = 0.7: a whole frame and three tenths of three others. Positions are renumbered as the authors do."""

    decode: bool = False
    layer: int = 3
    pruned: float = 0.7
    threshold: float = 0.9
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "decode")
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.475)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
        paper="Tao et al., 2025",
        venue="CVPR 2025",
        arxiv="2411.15024",
        code="github.com/KD-TAO/DyCoke",
        signals="visual tokens; with decode the attention row of the newest token, layer - 1",
        cost="one cosine per token of three frames of four, O(N D)",
        needs_video=True,
        settings={
            "decode": "choose for every new token the visual tokens that the later layers attend to; the KV cache stays whole",
            "layer": "decode: first LLM layer that attends to the chosen tokens only",
            "pruned": "decode: share of the visual tokens that is not attended to",
            "threshold": "decode: cosine of two attention rows from which on all tokens are attended to",
            "compat": "'authors': the counts that the released code makes of keep_ratio, and its order; more than four frames",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)
        at_least(self, "layer", 1, "; attention is read in the layer before")
        if not 0 <= self.pruned < 1:
            raise ValueError(f"dycoke: pruned must be from 0 to below 1, got {self.pruned}; the authors use 0.7")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        merge = Remove(Boundary(), _select, on=VIDEO)
        if self.compat is not None:  # a whole frame of four, and 1 - k of the others
            merge = Remove(Boundary(), partial(_as_authors, round((1 - authors_ratio(self)) / 0.75, 9)), on=VIDEO, counted=False)
        if not self.decode:
            return (merge,)
        check_llm_layer("dycoke", self.layer, geometry, 1, "L")
        need = attention(self.layer - 1)
        return merge, Attend(Decode(self.layer), partial(self._attend, need), (need,), on=VIDEO)

    def _attend(self, need: Signal, view: View) -> Selection:
        row = view.signals[need]
        keep = on_device([[max(int(count * (1 - self.pruned)), 1)] for count in view.counts], row.device)[:, 0]
        keep, _ = attended(row, view.memory.get("row"), view.real, keep, self.threshold)
        view.memory["row"] = row
        return Selection(keep=keep)


def _select(view: View) -> Selection:
    frames = frames_of(view)
    return Selection(keep=frames.flat(dycoke(frames.tokens, frames.real, view.keep)))


def _as_authors(pruned: float, view: View) -> Selection:
    frames = frames_of(view)
    order, kept = dycoke_authors(frames.tokens, frames.real, [len(own) for own in view.grids], pruned)
    return Selection(index=frames.spot.flatten(1).gather(1, order), real=kept.flatten(1).gather(1, order), order="given")
