"""FlashVID: keep attended tokens that differ from each other in every frame, and merge the others along trees through time.

Paper: Fan et al., ICLR 2026, arXiv 2602.08024.
Code:  github.com/Fanziyang-v/FlashVID at 1d37422, MIT: nothing copied, checked against its outputs.
Stage: boundary, prefill. Reads: visual tokens, attention received in the tower; an attention row. Batch: any. Deterministic: yes.

1. A cut is made between two frames whose mean tokens have a cosine below 0.9, and at the lowest cosines until there are 8 segments.
2. Diverse: seven tenths of the budget, shared equally by frames, are picked in each frame so that the least distance (1 - cosine) to those picked
   before is largest, distances to a candidate being multiplied by its attention in the tower layer whose output is used, and by its product
   with the mean of its segment. The first pick is the one whose nearest neighbour is farthest.
3. Trees: inside a segment each other token is linked to the most similar one of the frame before, if the cosine is above 0.8, as long as the
   segment keeps its share of the budget. What hangs together becomes its mean, at the place of the first.
4. If more are left than the budget has, those of each frame are clustered by density peaks with 7 neighbours; a cluster becomes its mean, at the
   place of its centre.
5. In front of a late LLM layer three tenths of the visual tokens stay, those that get most of the last token's attention in the layer before.

Paper to code: r -> the mean over the LLM's layers (1.25 r in front of the LLM, 0.375 r behind step 5, which is the budget here), alpha -> diverse,
S_tau -> threshold. `relevance=False` and 4 segments are the authors' setting for Qwen-VL (step 2 without the second factor).
Departures: counts are exact by largest remainder; a mean is that of all tokens of its tree, where the code divides by the number of direct children;
no token is kept twice, where the code lets chosen ones of a segment of one frame into step 4; density by at least two neighbours. `compat="authors"`
has the code's counts and means, in the pure functions and replay: a token that is kept twice has no second place in a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.methods._frames import frames_of, merged_selection, outer_then_inner, refuse_authors
from vtr.ops.density_peaks import density_peaks
from vtr.ops.farthest import cosine_distance_rows, farthest_first
from vtr.ops.frames import Frames, frame_means, products, stretches
from vtr.ops.gather import index_to_mask
from vtr.ops.segments import Segments, segments
from vtr.ops.topk import quota, topk_mask
from vtr.ops.trees import Trees, means_at, trees
from vtr.registry import register_method
from vtr.types import (
    Budget,
    Card,
    Geometry,
    Method,
    Remove,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    at_least,
    check_choices,
)


class Clustered(NamedTuple):
    """Centres `(G, T, P)` bool, their means `(G, T P, D)`, and `into (G, T P)` int64: the centre of each clustered token, -1 for none."""

    centre: Tensor
    tokens: Tensor
    into: Tensor


def diverse(frames: Frames, score: Tensor, parts: Segments | None, count: Tensor, most: int, repeat: bool = False) -> Tensor:
    """Picks tokens of each frame that get attention and differ from each other (step 2).

    Args:
        frames: tokens of each video; cosines in float32.
        score: `(G, T, P)`, attention, non-negative.
        parts: segments, by whose mean candidates are weighed besides; None for attention alone.
        count: `(G, T)` int64, how many of each frame.
        most: the largest of these, a Python int.
        repeat: a token may be picked again, as in the released code.

    Returns:
        Picks `(G, T, most)` int64 into P, in picking order; only the first `count` mean something. `O(T P^2 D)`, no host sync.
    """
    weight = score.double() * 1e6
    if parts is not None:
        means, slot = frame_means(frames), torch.where(parts.number < 0, len(parts.number[0]), parts.number)
        total = means.new_zeros(len(means), means.shape[1] + 1, means.shape[2])
        total.scatter_add_(1, slot[..., None].expand_as(means), means)
        segment = total.gather(1, slot[..., None].expand_as(means)) / parts.length.clamp_min(1)[..., None]
        weight = weight * products(frames.tokens, segment)
    real = frames.real.flatten(0, 1)
    made = []
    for some in stretches(frames.tokens):
        distance, _ = cosine_distance_rows(frames.tokens[:, some].flatten(0, 1), frames.real[:, some].flatten(0, 1), real.shape[1])
        assert isinstance(distance, Tensor)
        made.append(distance.unflatten(0, (len(weight), -1)))
    distance = torch.cat(made, 1).flatten(0, 1) * weight.flatten(0, 1)[:, None].float()
    distance = distance.masked_fill(~(real[:, None] & real[:, :, None]), torch.inf)
    near = distance.topk(min(2, distance.shape[1]), dim=1, largest=False).values[:, -1].masked_fill(~real, -torch.inf)
    return farthest_first(near.argmax(1), distance, real, most, repeat).unflatten(0, (len(weight), -1))


def by_segment(values: Tensor, parts: Segments) -> Tensor:
    """Returns the sums `(G, T)` of `values (G, T)` over the frames of segment 0, 1, ...; 0 behind the last."""
    slot = torch.where(parts.number < 0, values.shape[1], parts.number)
    return values.new_zeros(len(values), values.shape[1] + 1).scatter_add_(1, slot, values)[:, :-1]


def tree_means(frames: Frames, found: Trees, joining: Tensor, authors: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the means `(G, T P, D)` of trees at their roots, and the size of each `(G, T P)`; `authors` divides by direct children + 1."""
    divisor = torch.zeros_like(found.root).scatter_add_(1, found.parent, found.linked.long()) + 1 if authors else None
    return means_at(frames.tokens.flatten(1, 2), found.root, joining.flatten(1), divisor)


def clustered(tokens: Tensor, roots: Tensor, count: Tensor, neighbours: int = 7, least: int = 2) -> Clustered:
    """Clusters the roots of each frame by density peaks (step 4).

    Args:
        tokens: `(G, T P, D)`.
        roots: `(G, T, P)` bool.
        count: `(G, T)` int64, clusters of each frame.
        neighbours, least: the most and the fewest that density is measured by; at most as many as clusters, but for `least`.
    """
    groups, frames, places = roots.shape
    wide = tokens.view(groups, frames, places, -1)
    near = count.clamp(least, neighbours).minimum(roots.sum(2)).clamp_min(1)
    made = []
    for some in stretches(wide):
        own, wanted = roots[:, some].flatten(0, 1), count[:, some].flatten()
        peaks = density_peaks(wide[:, some].flatten(0, 1), own, wanted, places, near[:, some].flatten())
        into = torch.where(own & (wanted > 0)[:, None], peaks.center.gather(1, peaks.cluster.clamp_min(0)), -1)
        made.append(into.unflatten(0, (groups, -1)))
    return cluster_means(tokens, torch.cat(made, 1))


def cluster_means(tokens: Tensor, into: Tensor) -> Clustered:
    """Averages `tokens (G, T P, D)` over clusters; `into (G, T, P)` int64 is the place in its frame of each token's centre, -1 for none."""
    frames, places = into.shape[1:]
    centre = into == torch.arange(places, device=into.device)
    start = torch.arange(frames, device=into.device)[:, None] * places
    itself = start + torch.arange(places, device=into.device)
    target = torch.where(into >= 0, start + into, itself).flatten(1)
    mean, _ = means_at(tokens, target, (into >= 0).flatten(1))
    return Clustered(centre, mean, torch.where(into >= 0, start + into, -1).flatten(1))


def flashvid(
    frames: Frames,
    score: Tensor,
    parts: Segments,
    keep: Tensor,
    most: int,
    share: float = 0.7,
    threshold: float = 0.8,
    relevance: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps diverse tokens of every frame and merges the others along trees.

    Args:
        frames: tokens of each video by frame and place.
        score: `(G, T, P)`, attention.
        parts: segments of each video.
        keep: `(G,)` int64, at most the real tokens.
        most: at least the largest number of diverse tokens of a frame, a Python int.
        share: of the budget that goes to diverse tokens.
        threshold: cosine that a link has to be above.
        relevance: weigh diverse candidates by their product with the mean of their segment.

    Returns:
        Keep mask `(G, T, P)`, tokens `(G, T, P, D)`, of which kept ones count, and `pivot (G, T, P)` int64 into the `T P` tokens, -1 for none.
    """
    count = frames.real.sum(2)
    picked = (keep.double() * share - 1e-9).ceil().long()
    number = quota(count.double(), count, picked)
    picks = diverse(frames, score, parts if relevance else None, number, most)
    shape = frames.real.shape
    chosen = index_to_mask(picks.flatten(0, 1), torch.arange(most, device=keep.device) < number.flatten()[:, None], shape[2]).view(shape)
    joining = frames.real & ~chosen
    size = by_segment(count, parts)
    budget = quota(size.double(), size, keep)
    found = trees(frames, joining, parts, size - budget, threshold)
    roots = joining & ~found.linked.view(shape)
    left = roots.sum(2)
    part = parts.number.clamp_min(0)
    weight = left * (budget.double() / by_segment(left, parts).clamp_min(1)).gather(1, part)
    tokens, _ = tree_means(frames, found, joining)
    made = clustered(tokens, roots, quota(weight, left, keep - picked))
    values = torch.where(made.centre.flatten(1)[..., None], made.tokens.to(frames.tokens.dtype), frames.tokens.flatten(1, 2))
    pivot = torch.where(joining.flatten(1), made.into.gather(1, found.root), -1)
    return chosen | made.centre, values.view_as(frames.tokens), pivot.view(shape)


@register_method("flashvid")
@dataclass(frozen=True, kw_only=True)
class FlashVID(Method):
    """The default is the authors' 25 % on average: 31 % in front of the LLM, three tenths of that in its last layers; positions are kept."""

    segments: int = 8
    diverse: float = 0.7
    threshold: float = 0.8
    relevance: bool = True
    inner_ratio: float = 0.3
    layer: int | None = None
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "prefill")
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.09375)
    card: ClassVar[Card] = Card(
        title="FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging",
        paper="Fan et al., 2026",
        venue="ICLR 2026",
        arxiv="2602.08024",
        code="github.com/Fanziyang-v/FlashVID",
        signals="visual tokens, attention received in the feature layer; attention row of the last token, layer - 1",
        cost="cosines inside each frame and of neighbouring frames, distances inside each frame, O(T P^2 D)",
        needs_video=True,
        settings={
            "segments": "that a video is cut into at least",
            "diverse": "share of the budget that is picked by attention and difference",
            "threshold": "cosine above which a token may be merged into one of the frame before",
            "relevance": "weigh candidates by their product with the mean of their segment, too; false for Qwen-VL in the paper",
            "inner_ratio": "share of the tokens left in front of the LLM that stays behind `layer`; 1 = nothing is removed in the LLM",
            "layer": "LLM layer from whose input on tokens are gone; None: 20 of 28, at the same relative depth",
            "compat": "'authors': the released counts and means, with tokens that come twice; pure functions and replay only",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)
        at_least(self, "segments", 1)
        at_least(self, "layer", 1, "; attention is read in the layer before")
        if not 0 <= self.diverse <= 1:
            raise ValueError(f"flashvid: diverse must be from 0 to 1, got {self.diverse}; the authors use 0.7")
        if not 0 < self.inner_ratio <= 1:
            raise ValueError(f"flashvid: inner_ratio must be above 0 and at most 1, got {self.inner_ratio}; the authors use 0.3")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        refuse_authors(self, "the released code may keep a token twice, and a token has one place in the sequence")
        return outer_then_inner(self, geometry, self._outer, _inner, 20, Remove)

    def _outer(self, need: Signal, view: View) -> Selection:
        frames = frames_of(view)
        parts = segments(frame_means(frames), frames.real.any(2), 0.9, self.segments)
        places = [rows * cols for rows, cols in (view.grid(group) for group in range(len(view.grids)))]
        most = max(
            min(place, int(self.diverse * keep * place / max(count, 1)) + 2)
            for place, keep, count in zip(places, view.keeps, view.counts, strict=True)
        )
        score = frames.of(view.signals[need])
        return merged_selection(frames, *flashvid(frames, score, parts, view.keep, most, self.diverse, self.threshold, self.relevance))


def _inner(row: Signal, view: View) -> Selection:
    return Selection(keep=topk_mask(view.signals[row], view.real, view.keep))
