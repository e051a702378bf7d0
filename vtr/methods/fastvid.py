"""FastVID: cut a video into segments; keep the most attended tokens of every frame, and merge the rest of a segment into dense ones of a few frames.

Paper: Shen et al., NeurIPS 2025, arXiv 2503.11187.
Code:  github.com/LunarShen/FastVID at a40a109, MIT: nothing copied, checked against the outputs of its LLaVA-OneVision variant.
Stage: boundary. Reads: visual tokens, attention received in the tower. Batch: any. Deterministic: yes.

1. A cut is made between two frames whose descriptors have a cosine below 0.9, and at the lowest cosines until there are 8 segments.
2. Salient: three fifths of the budget, shared equally by frames, go to the tokens of each frame that get most attention; they stay as they are.
3. Anchor frames of a segment are the last one and every fourth before it. Two fifths of the budget go to context tokens there: those of the other
   tokens of an anchor frame with the highest density (by 4 neighbours) times distance to anything denser.
4. For every anchor frame by itself, each token of the segment that is not salient joins the most similar context token of that frame. A context
   token x that n tokens with mean m joined, itself among them, becomes w x + (1 - w) m with w = max(1 / (n + 1), 0.6).

Paper to code: r -> keep_ratio, c -> segments, tau -> threshold, d -> context, p -> every, beta -> beta.
Departures: the descriptor of a frame is the mean of its tokens and attention is what a token gets in the tower layer whose output is used,
where the code loads SigLIP's pooling head for both, which the models' checkpoints do not have; counts are exact by largest remainder, where the
code drops remainders; no noise in the density; what the anchor frames cannot hold of a large budget goes to salient tokens.
`compat="authors"` has the code's counts, in the pure functions and replay: its pooling head is in no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods._frames import frames_of, merged_selection, refuse_authors
from vtr.ops.density_peaks import peak_scores
from vtr.ops.frames import Frames, best_of_frames, frame_means, stretches
from vtr.ops.gather import left_align, take
from vtr.ops.segments import Segments, segments
from vtr.ops.topk import quota
from vtr.registry import register_method
from vtr.types import VIDEO, Boundary, Budget, Card, Geometry, Merge, Method, Selection, Signal, Stage, Step, View, at_least, check_choices
from vtr.types.signals import received

CHUNK = 2**24
"""Similarities that are held at a time."""


class Shares(NamedTuple):
    """Tokens of each frame that stay, `(G, T)` int64 each: `salient` ones, and `context` ones, 0 but for anchor frames.

    `alone (G, T)` bool: the context tokens of the frame take in tokens of the frame only.
    """

    salient: Tensor
    context: Tensor
    alone: Tensor


def anchor_frames(parts: Segments, every: int = 4) -> tuple[Tensor, Tensor]:
    """Returns which frames are anchors `(G, T)` bool, and how many of them the segment of each frame has `(G, T)` int64."""
    return (parts.length > 0) & (parts.behind % every == 0), -(-parts.length // every)


def exact_shares(count: Tensor, parts: Segments, keep: Tensor, context: float = 0.4, every: int = 4) -> Shares:
    """Shares a budget over frames by largest remainder.

    Args:
        count: `(G, T)` int64, tokens of each frame.
        parts: segments of each video.
        keep: `(G,)` int64, at most `count.sum(1)`.
        context: share of the budget that goes to context tokens.
        every: distance of anchor frames.
    """
    anchor, anchors = anchor_frames(parts, every)
    wanted = (keep.double() * context + 1e-9).long()
    salient = quota(count.double(), count, keep - wanted)
    room = torch.where(anchor, count - salient, 0)
    dense = quota(parts.length.double() / anchors.clamp_min(1) * anchor, room, wanted)
    left = keep - salient.sum(1) - dense.sum(1)
    salient = salient + quota(count.double(), count - salient - dense, left)
    return Shares(salient, dense, torch.zeros_like(anchor))


def authors_shares(count: Tensor, parts: Segments, ratio: float, context: float = 0.4, every: int = 4) -> Shares:
    """Returns the counts of the released code for its retention ratio; every frame has `count (G, T)` tokens."""
    anchor, anchors = anchor_frames(parts, every)
    per_frame = int(int(count[0, 0]) * ratio)
    own = int(per_frame * context)
    dense = torch.where(anchor, own * parts.length // anchors.clamp_min(1), 0)
    return Shares(torch.full_like(count, per_frame - own), dense, dense == own)


def context_scores(frames: Frames, left: Tensor, neighbours: int = 4) -> Tensor:
    """How good a centre each token of a frame makes among those that are `left (G, T, P)`: `(G, T, P)` float64, -inf elsewhere."""
    found = []
    for some in stretches(frames.tokens):
        tokens, own = frames.tokens[:, some].flatten(0, 1), left[:, some].flatten(0, 1)
        near = own.sum(1).clamp(1, neighbours)
        found.append(peak_scores(tokens, own, near)[0].unflatten(0, (len(left), -1)))
    return torch.cat(found, 1)


class Joined(NamedTuple):
    """Tokens that joined each of C pivots: `size (G, C)` int64, `mean (G, C, D)`; and `into (G, T, P)` int64, pivot of each token, -1 none."""

    size: Tensor
    mean: Tensor
    into: Tensor


def join(frames: Frames, joining: Tensor, parts: Segments, alone: Tensor, index: Tensor, real: Tensor) -> Joined:
    """For every anchor frame by itself, lets tokens of its segment join the most similar pivot of that frame.

    Args:
        frames: tokens of each video; cosines in float32 at least.
        joining: `(G, T, P)` bool.
        parts: segments of each video.
        alone: `(G, T)` bool, frames whose pivots take in tokens of the frame only.
        index, real: `(G, C)` pivots, places among the `T P` tokens in ascending order, and whether they are.

    Returns:
        `Joined`, where `into` names the most similar of all that a token joined. Two products of pivots and tokens, `O(C T P D)`, memory
        `CHUNK` numbers at a time, no host sync.
    """
    tokens, (groups, count, places) = frames.tokens, frames.real.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    number = index.shape[1]
    pivots = F.normalize(take(tokens.flatten(1, 2), index).to(dtype), dim=-1)
    frame = torch.where(real, index // places, count)  # of each pivot
    segment = torch.where(real, parts.number.gather(1, frame.clamp_max(count - 1)), -2)
    only = alone.gather(1, frame.clamp_max(count - 1))
    order = torch.arange(number, device=tokens.device)[:, None]
    size = torch.zeros(groups, number, dtype=torch.int64, device=tokens.device)
    total, into = torch.zeros_like(pivots), []
    step = max(1, CHUNK // max(1, groups * places * max(number, tokens.shape[3])))
    for start in range(0, count, step):
        part = tokens[:, start : start + step].flatten(1, 2).to(dtype)  # (G, n, D)
        time = torch.arange(start, start + part.shape[1] // places, device=tokens.device).repeat_interleave(places)
        may = joining[:, start : start + step].flatten(1)[:, None] & (
            segment[..., None] == parts.number.gather(1, time.expand(groups, -1))[:, None]
        )
        may &= ~only[..., None] | (frame[..., None] == time)
        similarity = (pivots @ F.normalize(part, dim=-1).mT).masked_fill(~may, -torch.inf)  # (G, C, n)
        row = frame[..., None].expand_as(similarity)
        best = torch.full((groups, count + 1, part.shape[1]), -torch.inf, dtype=dtype, device=tokens.device)
        tied = may & (similarity == best.scatter_reduce(1, row, similarity, "amax").gather(1, row))
        first = torch.full_like(best, number, dtype=torch.int64)
        first = first.scatter_reduce(1, row, torch.where(tied, order, number), "amin")
        chosen = tied & (order == first.gather(1, row))
        size = size + chosen.sum(2)
        total = total + chosen.to(dtype) @ part
        nearest = similarity.masked_fill(~chosen, -torch.inf).argmax(1)
        into.append(torch.where(chosen.any(1), index.gather(1, nearest), -1).unflatten(1, (-1, places)))
    return Joined(size, total / size.clamp_min(1)[..., None], torch.cat(into, 1))


def fastvid(
    frames: Frames, score: Tensor, parts: Segments, shares: Shares, most: int, beta: float = 0.6, neighbours: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the salient tokens of every frame, and merges the others of a segment into its context tokens.

    Args:
        frames: tokens of each video by frame and place.
        score: `(G, T, P)`, saliency.
        parts: segments of each video.
        shares: how many tokens of each frame stay.
        most: at least the largest number of context tokens of a video, a Python int; there may be none.
        beta: least weight of the context token itself.
        neighbours: that density is measured by.

    Returns:
        Keep mask `(G, T, P)`, tokens `(G, T, P, D)`, of which kept ones count, and `pivot (G, T, P)` int64 into the `T P` tokens, -1 for none.
    """
    salient = best_of_frames(score, frames.real, shares.salient)
    left = frames.real & ~salient
    context = best_of_frames(context_scores(frames, left, neighbours), left, shares.context)
    index, real = left_align(context.flatten(1), max(1, min(most, context[0].numel())))
    joined = join(frames, left, parts, shares.alone, index, real)
    flat = frames.tokens.flatten(1, 2)
    own = take(flat, index)
    weight = (1 / (joined.size + 1)).clamp_min(beta)[..., None].to(joined.mean.dtype)
    mixed = (weight * own.to(joined.mean.dtype) + (1 - weight) * joined.mean).to(flat.dtype)
    made = flat.scatter(1, index[..., None].expand_as(own), torch.where((real & (joined.size > 1))[..., None], mixed, own))
    whole = (salient | context | ~frames.real).all((1, 2))[:, None, None]  # nothing to merge
    tokens = torch.where(whole[..., None], frames.tokens, made.view_as(frames.tokens))
    return salient | context, tokens, joined.into


@register_method("fastvid")
@dataclass(frozen=True, kw_only=True)
class FastVID(Method):
    """The default is r = 10 %, as in the released scripts; positions are kept."""

    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    every: int = 4
    beta: float = 0.6
    neighbours: int = 4
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.1)
    card: ClassVar[Card] = Card(
        title="FastVID: Dynamic Density Pruning for Fast Video Large Language Models",
        paper="Shen et al., 2025",
        venue="NeurIPS 2025",
        arxiv="2503.11187",
        code="github.com/LunarShen/FastVID",
        signals="visual tokens, attention received in the feature layer",
        cost="distances inside each frame, O(T P^2 D), and two products of context tokens with all others",
        needs_video=True,
        settings={
            "segments": "that a video is cut into at least",
            "threshold": "cosine of neighbouring frames below which there is a cut",
            "context": "share of the budget that goes to context tokens",
            "every": "distance of anchor frames in a segment, from its last one",
            "beta": "least weight of a context token in its own new value",
            "neighbours": "that density is measured by",
            "compat": "'authors': the released counts; pure functions and replay only, as checkpoints lack SigLIP's pooling head",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)
        for name in ("segments", "every", "neighbours"):
            at_least(self, name, 1)
        for name in ("context", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"fastvid: {name} must be from 0 to 1, got {getattr(self, name)}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        refuse_authors(self, "the released code reads SigLIP's pooling head, which checkpoints of multimodal models do not have")
        need = received(geometry.feature_layer)
        return (Merge(Boundary(), partial(self._select, need), (need,), on=VIDEO),)

    def _select(self, need: Signal, view: View) -> Selection:
        frames = frames_of(view)
        count = frames.real.sum(2)
        parts = segments(frame_means(frames), count > 0, self.threshold, self.segments)
        shares = exact_shares(count, parts, view.keep, self.context, self.every)
        most = max(int(view.most * self.context + 1e-9), 1)
        score = frames.of(view.signals[need])
        return merged_selection(frames, *fastvid(frames, score, parts, shares, most, self.beta, self.neighbours))
