"""HoliTom: merge what stays the same over stretches of a video, then merge and prune inside them; and once more inside the LLM.

Paper: Shao et al., NeurIPS 2025, arXiv 2505.21334.
Code:  github.com/cokeshao/HoliTom at e9b2972, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary, prefill. Reads: visual tokens, attention received in the tower; an attention row. Batch: any. Deterministic: yes.

1. A place is static in a window of frames where the cosine of every two neighbouring frames is above 0.8 there. Dynamic programming cuts the
   video into windows so that the most tokens are saved by making one, their mean, of the static tokens at a place of a window.
2. What is left are the dynamic tokens of each frame and the static ones of each window; all get the same share of the budget.
3. Of the dynamic tokens of a frame those stay that get the most attention in the tower layer whose output is used.
4. The static tokens of a window are clustered by density peaks with 7 neighbours. A cluster becomes 0.6 of its centre and 0.4 of the mean of its
   other members, at the place of the centre in the window's first frame.
5. In front of LLM layer k the half of the visual tokens that get most of the last token's attention in layer k - 1 stay. Every other one, in
   order, is merged into the most similar of them by cosine, which becomes the mean of both.

Paper to code: r -> the share that steps 1 to 4 leave (twice the budget, which is what step 5 leaves), tau -> tau, beta -> beta, K -> neighbours,
k -> layer (18 of 28), R -> 1/2. `inner=False` is the paper's "w/o M".
Departures: exact counts by largest remainder, where the code rounds up in every frame; density is measured by at least two neighbours, where
the code lets rounding decide the centre of a single cluster; static tokens take the place of their centre in the window's first frame, where
the code puts them in front of the window. A budget above what step 2 has leaves those static tokens unmerged that changed most.
`compat="authors"` has the code's counts and order. The parameter D of the code must be 0 and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.methods._frames import authors_ratio, frames_of, merged_selection, order_by, outer_then_inner
from vtr.ops.canvas import on_device
from vtr.ops.density_peaks import peaks_among
from vtr.ops.distances import of_products
from vtr.ops.frames import Frames, best_of_frames, best_of_video, channels, cosine_to_frame
from vtr.ops.gather import left_align, take
from vtr.ops.halving import merge_by_halves, nearest_kept
from vtr.ops.static_windows import Windows, static_windows
from vtr.ops.topk import quota, topk_mask
from vtr.registry import register_method
from vtr.types import (
    Budget,
    Card,
    Geometry,
    Merge,
    Method,
    PositionOption,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    at_least,
    check_choices,
)


class Shares(NamedTuple):
    """How many tokens stay.

    Args:
        dynamic: `(G, T)` int64 of each frame.
        static: `(G, T)` int64 of the window that begins there, 0 elsewhere.
        apart: `(G, T, P)` bool, static tokens that are not merged.
    """

    dynamic: Tensor
    static: Tensor
    apart: Tensor


class Merged(NamedTuple):
    """Keep mask `(G, T, P)`, tokens `(G, T, P, D)`, of which kept ones count, and `pivot (G, T, P)` int64 into the `T P` tokens, -1 for none."""

    keep: Tensor
    tokens: Tensor
    pivot: Tensor


def windows_of(frames: Frames, tau: float = 0.8, longest: int = 1024) -> tuple[Windows, Tensor]:
    """Returns the windows of each video, of at most `longest` frames, and the cosine `(G, T, P)` of every token to the frame before."""
    cosine, paired = cosine_to_frame(frames.tokens, frames.real, range(-1, frames.tokens.shape[1] - 1))
    return static_windows(paired & (cosine > tau), frames.there, longest), cosine


def blocks_of(frames: Frames, windows: Windows) -> tuple[Tensor, Tensor]:
    """Returns how many dynamic tokens each frame has, and how many static ones the window that begins there, `(G, T)` int64 each."""
    first = torch.arange(windows.start.shape[1], device=windows.start.device) == windows.start
    return (frames.real & ~windows.static).sum(2), torch.where(first, windows.static.sum(2), 0)


def exact_shares(frames: Frames, windows: Windows, cosine: Tensor, keep: Tensor) -> Shares:
    """Shares `keep (G,)` over the dynamic tokens of frames and the static tokens of windows, by largest remainder."""
    dynamic, static = blocks_of(frames, windows)
    blocks = torch.cat([dynamic, static], 1)
    extra = (keep - blocks.sum(1)).clamp_min(0)
    later = windows.static & (torch.arange(dynamic.shape[1], device=keep.device) > windows.start)[..., None]
    share = quota(blocks.double(), blocks, keep - extra)
    count = dynamic.shape[1]
    return Shares(share[:, :count], share[:, count:], best_of_video(-cosine, later, extra))


def authors_shares(frames: Frames, windows: Windows, ratio: float) -> tuple[Shares, Tensor]:
    """Returns the counts of the released code for its retention ratio, and the ratio `(G,)` after merging; waits for the device."""
    dynamic, static = blocks_of(frames, windows)
    total = frames.real.sum((1, 2)).double()
    adjusted = (ratio / ((total - windows.gain) / total)).clamp_max(1)[:, None]
    return Shares((dynamic * adjusted).ceil().long(), (static * adjusted).round().long(), torch.zeros_like(windows.static)), adjusted[:, 0]


def holitom(
    frames: Frames, score: Tensor, windows: Windows, shares: Shares, beta: float = 0.6, neighbours: int = 7, least: int = 2
) -> Merged:
    """Merges the static tokens of windows and clusters them; keeps the most attended of the others.

    Args:
        frames: tokens of each video by frame and place; means and distances in float64.
        score: `(G, T, P)`, higher stays.
        windows: of each video.
        shares: how many stay.
        beta: weight of the centre in its cluster.
        neighbours: that density is measured by, at most as many as clusters.
        least: neighbours at least, which the released code does not ask for.

    Returns:
        `Merged`. `O(T P D + W P^2 D)` for W <= T/2 windows, memory that of the result, of the `(W, P, P)` distances and of some channels at a
        time, no host sync.
    """
    tokens, (groups, count, places) = frames.tokens, frames.real.shape
    time = torch.arange(count, device=tokens.device)
    kept = best_of_frames(score, frames.real & ~windows.static, shares.dynamic) | shares.apart
    begins = (time == windows.start) & windows.static.any(2)
    index, real = left_align(begins, max(count // 2, 1))  # (G, W) first frames; behind the last window others, which stay as they are
    width = index.shape[1]
    number = (begins.cumsum(1) - 1).gather(1, windows.start).clamp(0, width - 1)  # (G, T) window of each frame, where it is in one

    joining = windows.static & ~shares.apart
    member = (number[:, None] == torch.arange(width, device=tokens.device)[:, None]).double()  # (G, W, T)
    size = (member @ joining.double()).clamp_min(1)[..., None]  # (G, W, P, 1) tokens of a mean

    def means(some: slice) -> Tensor:  # some channels of what stands still in each window, (G, W, P, d)
        part = tokens[..., some].double().masked_fill(~joining[..., None], 0.0)
        return (member @ part.flatten(2)).unflatten(2, part.shape[2:]) / size

    chunks = channels(tokens)
    products = torch.zeros(groups * width, places, places, dtype=torch.float64, device=tokens.device)
    for some in chunks:
        mean = means(some).flatten(0, 1)
        products.baddbmm_(mean, mean.mT)

    static = (take(windows.static, index) & real[..., None]).flatten(0, 1)  # (G W, P)
    wanted = torch.where(real, shares.static.gather(1, index), 0).flatten()
    near = wanted.clamp_max(neighbours).clamp_min(least).minimum(static.sum(1)).clamp_min(1)
    peaks = peaks_among(of_products(products) / tokens.shape[3] ** 0.5, static, wanted, places, near)
    pivot = torch.where(static & (wanted > 0)[:, None], peaks.center.gather(1, peaks.cluster.clamp_min(0)), -1)  # (G W, P)
    itself = torch.arange(places, device=tokens.device)
    centre, other = pivot == itself, (pivot >= 0) & (pivot != itself)
    where = pivot.clamp_min(0)
    others = torch.zeros_like(pivot).scatter_add_(1, where, other.long())[..., None]

    made, at = tokens.clone(), index[:, :, None, None]
    for some in chunks:
        mean = means(some).flatten(0, 1)
        sums = torch.zeros_like(mean).scatter_add_(1, where[..., None].expand_as(mean), mean.masked_fill(~other[..., None], 0.0))
        mixed = torch.where(others > 0, beta * mean + (1 - beta) * sums / others.clamp_min(1), mean).to(tokens.dtype)
        part = made[..., some]
        merged = torch.where(centre[..., None], mixed, take(part, index).flatten(0, 1)).unflatten(0, (groups, width))
        part.scatter_(1, at.expand_as(merged), merged)

    centre = centre.unflatten(0, (groups, width))
    kept = kept | torch.zeros_like(kept).scatter(1, index[..., None].expand(-1, -1, places), centre)
    own = pivot.unflatten(0, (groups, width)).gather(1, number[..., None].expand_as(joining))  # (G, T, P) place of its centre
    own = torch.where(joining & (own >= 0), windows.start[..., None] * places + own, -1)
    return Merged(kept, made, own)


@register_method("holitom")
@dataclass(frozen=True, kw_only=True)
class HoliTom(Method):
    """The default is r = 25 % in front of the LLM and half of that in its later layers; positions are renumbered as the authors do."""

    tau: float = 0.8
    beta: float = 0.6
    neighbours: int = 7
    inner_ratio: float = 0.5
    layer: int | None = None
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "prefill")
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.125)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="HoliTom: Holistic Token Merging for Fast Video Large Language Models",
        paper="Shao et al., 2025",
        venue="NeurIPS 2025",
        arxiv="2505.21334",
        code="github.com/cokeshao/HoliTom",
        signals="visual tokens, attention received in the feature layer; attention row of the last token, layer - 1",
        cost="one cosine per token, distances of static tokens inside each window, O(T P^2 D / 2) at most; in the LLM dropped x kept cosines",
        needs_video=True,
        settings={
            "tau": "cosine above which a place has not changed",
            "beta": "weight of its centre in the value of a cluster",
            "neighbours": "that density is measured by",
            "inner_ratio": "share of the tokens left in front of the LLM that stays behind `layer`; 1 = nothing is merged in the LLM",
            "layer": "LLM layer in front of which tokens are merged once more; None: 18 of 28, at the same relative depth",
            "compat": "'authors': the counts that the released code makes of keep_ratio, and its order",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)
        at_least(self, "neighbours", 1)
        at_least(self, "layer", 1, "; attention is read in the layer before")
        if not 0 < self.inner_ratio <= 1:
            raise ValueError(f"holitom: inner_ratio must be above 0 and at most 1, got {self.inner_ratio}; the authors use 0.5")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"holitom: beta must be from 0 to 1, got {self.beta}; the authors use 0.6")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        ratio = None if self.compat is None else min(authors_ratio(self) / self.inner_ratio, 1.0)
        return outer_then_inner(
            self, geometry, partial(self._outer, ratio), partial(_inner, None if ratio is None else self.inner_ratio), 18, Merge, "k"
        )

    def _outer(self, ratio: float | None, need: Signal, view: View) -> Selection:
        frames = frames_of(view)
        windows, cosine = windows_of(frames, self.tau)
        score = frames.of(view.signals[need])
        if ratio is None:
            shares = exact_shares(frames, windows, cosine, view.keep)
            return merged_selection(frames, *holitom(frames, score, windows, shares, self.beta, self.neighbours))
        merged = holitom(frames, score, windows, authors_shares(frames, windows, ratio)[0], self.beta, self.neighbours, least=1)
        start, still = windows.start[..., None].expand_as(windows.static), windows.static  # what stands still comes in front of its window
        return merged_selection(frames, *merged, order_by(*(part.flatten(1) for part in (merged.keep, start, ~still))))


def _inner(ratio: float | None, row: Signal, view: View) -> Selection:
    count, most = view.keep, view.most
    if ratio is not None:
        own = [round(n * ratio) for n in view.counts]
        count, most = on_device([own], view.real.device)[0], max(own)
    keep = topk_mask(view.signals[row], view.real, count)
    into = nearest_kept(view.tokens, view.real, keep, most)
    tokens = merge_by_halves(view.tokens, view.real, keep, into)
    return Selection(keep=keep, tokens=tokens, assign=torch.where(view.real, into, -1))
