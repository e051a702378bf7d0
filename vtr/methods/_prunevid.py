"""PruneVid's parts: segments of a video, tokens that stand still in one, blocks of tokens and their clusters. Not a method.

A block is what is clustered together: the tokens of a segment that stand still, averaged over its frames, or the others of one frame. All of
them are kept on one canvas `(G, T, P)`: row t holds the tokens of frame t that move, at their places, and if a segment begins there, what
stands still in it at the other places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.ops.density_peaks import density_peaks
from vtr.ops.distances import euclidean
from vtr.ops.frames import Frames, frame_means, packed_frames
from vtr.ops.precision import outside_autocast
from vtr.ops.topk import quota, topk_mask

NEIGHBOURS = 7  # k of every density
SMALL = 14  # a block of so many tokens is not clustered; Visual-AI/PruneVid at b12600c
SMALL_WEIGHT = 2  # 1 / the published cluster ratio
CHUNK = 2**23
"""Numbers that are compared at a time."""


def refined(label: Tensor, count: Tensor) -> Tensor:
    """Makes clusters of frames contiguous.

    Only the longest runs of a cluster stay, none of a cluster whose runs are single frames. A stretch of other frames takes the label of the
    longer of the runs beside it, the one in front as it is by then; on a tie that in front.

    Args:
        label: `(G, T)` int64 from 0 to T - 1, of the first `count` frames.
        count: `(G,)` int64.

    Returns:
        `(G, T)` int64; means nothing behind `count`. `O(T)` operations on `(G,)`, no host sync.
    """
    groups, frames = label.shape
    at = torch.arange(frames, device=label.device)
    real = at < count[:, None]
    label = torch.where(real, label, frames)
    change = torch.ones_like(real)
    change[:, 1:] = label[:, 1:] != label[:, :-1]
    run = change.cumsum(1) - 1
    length = torch.zeros_like(label).scatter_add(1, run, torch.ones_like(label)).gather(1, run)
    longest = torch.zeros(groups, frames + 1, dtype=torch.int64, device=label.device).scatter_reduce(1, label, length, "amax")
    stays = (length == longest.gather(1, label)) & (length > 1) & real

    following = torch.where(stays, at, frames).flip(1).cummin(1).values.flip(1)  # the frame that stays, here or next
    none = following == frames
    following = following.clamp_max(frames - 1)
    next_label = torch.where(none, 0, label.gather(1, following))
    next_length = torch.where(none, 0, length.gather(1, following))
    now, size = torch.full_like(count, -1), torch.zeros_like(count)
    found, moving = [], torch.zeros_like(real[:, 0])
    for t in range(frames):  # what a stretch takes depends on what those in front of it took
        taken = torch.where(size >= next_length[:, t], now, next_label[:, t])
        taken = torch.where(taken < 0, 0, taken)  # nothing stays
        new = torch.where(stays[:, t], label[:, t], torch.where(moving, now, taken))
        size = torch.where(new == now, size + 1, 1)
        now, moving = new, ~stays[:, t]
        found.append(new)
    return torch.stack(found, 1)


def frame_clusters(means: Tensor, present: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Clusters the frames of a video by density peaks.

    Args:
        means: `(G, T, D)`.
        present: `(G, T)` bool, frames that count.
        ratio: clusters per frame; at least one cluster.

    Returns:
        `(G, T)` int64 cluster of each present frame, brought to the front, and `(G, T)` int64 the place of each frame there.
    """
    packed, place = packed_frames(means, present)
    count = present.sum(1)
    clusters = (count.double() * ratio).long().clamp_min(1)
    real = torch.arange(present.shape[1], device=count.device) < count[:, None]
    most = max(1, int(present.shape[1] * ratio))
    return density_peaks(packed, real, clusters, most, count.clamp_max(NEIGHBOURS)).cluster, place


def segment_starts(means: Tensor, present: Tensor, ratio: float) -> Tensor:
    """Returns the first frame `(G, T)` int64 of the segment that each present frame is in; arguments as for `frame_clusters`."""
    label, place = frame_clusters(means, present, ratio)
    label = refined(label.clamp_min(0), present.sum(1))
    at = torch.arange(label.shape[1], device=label.device).expand_as(label)
    change = torch.ones_like(label, dtype=torch.bool)
    change[:, 1:] = label[:, 1:] != label[:, :-1]
    start = torch.where(change, at, 0).cummax(1).values
    frame = torch.empty_like(place).scatter(1, place, at)
    return frame.gather(1, start).gather(1, place)


class Still(NamedTuple):
    """What is at each place of each segment, in the row of its first frame.

    `number (G, T, P)` int64: tokens there; 0 in other rows. `likeness (G, T, P)`: the mean cosine between two of them, -1 where there are not two.
    """

    number: Tensor
    likeness: Tensor


def members_of(start: Tensor, present: Tensor) -> Tensor:
    """Returns which frames `(G, T, T)` bool, last axis, each segment has, named by its first frame."""
    at = torch.arange(start.shape[1], device=start.device)
    return (start[:, None] == at[:, None]) & present[:, None]


def still(frames: Frames, member: Tensor) -> Still:
    """Compares the tokens of the frames of a segment place by place; `member` is that of `members_of`. `O(T^2 P D)`."""
    dtype = torch.promote_types(frames.tokens.dtype, torch.float32)
    weight = member.to(dtype)
    count = (weight @ frames.real.to(dtype)).long()
    paid = []
    for part in frames.tokens.split(_step(frames.tokens, 2), 2):
        norm = torch.linalg.vector_norm(part, dim=-1, dtype=dtype)
        unit = part.to(dtype) / norm.clamp_min(1e-12)[..., None]
        both = (weight @ unit.flatten(2)).view_as(unit)
        paid.append(torch.linalg.vector_norm(both, dim=-1).square() - weight @ (norm > 0).to(dtype))
    pairs = (count * (count - 1)).clamp_min(1)
    return Still(count, torch.where(count > 1, torch.cat(paid, 2) / pairs, -1.0))


def _step(tokens: Tensor, dim: int) -> int:
    """How many entries of a dimension make up a chunk."""
    return max(1, CHUNK * tokens.shape[dim] // max(1, tokens.numel()))


def limited(static: Tensor, likeness: Tensor, saved: Tensor, most: Tensor) -> Tensor:
    """Leaves of `static (G, T, P)` those with the largest likeness, as long as all together save at most `most (G,)` tokens."""
    order = torch.where(static, likeness, -torch.inf).flatten(1).argsort(dim=1, descending=True, stable=True)
    cost = torch.where(static, saved, 0).flatten(1).gather(1, order)
    fits = cost.cumsum(1) <= most[:, None]
    return static & torch.zeros_like(fits).scatter(1, order, fits).view(static.shape)


def block_quotas(size: Tensor, keep: Tensor) -> Tensor:
    """Shares a budget over blocks in proportion to their tokens, small ones counting twice.

    Args:
        size: `(G, B)` int64.
        keep: `(G,)` int64, at most `size.sum(1)`.

    Returns:
        `(G, B)` int64 with row sums `keep`.
    """
    return quota(torch.where(size > SMALL, size, SMALL_WEIGHT * size).double(), size, keep)


def authors_quotas(size: Tensor, ratio: float) -> Tensor:
    """Returns how many clusters the released code makes of blocks of `size` tokens."""
    return torch.where(size > SMALL, (size.double() * ratio).long(), size)


class Canvas(NamedTuple):
    """The tokens of all blocks, see above.

    `static (G, T, P)` and `moving (G, T, P)` bool: whether what stands for a segment, or a token of the frame, is there. `home (G, T, P)` int64:
    the row where each token of a frame is found. `pivot (G, T, P)` int64: the frame whose token stands for an entry.
    """

    static: Tensor
    moving: Tensor
    home: Tensor
    pivot: Tensor


def canvas_of(real: Tensor, start: Tensor, member: Tensor, static: Tensor) -> Canvas:
    """Returns the canvas of frames with tokens `real (G, T, P)`, of which `static (G, T, P)` are the places that stand still in a segment."""
    at = torch.arange(real.shape[1], device=real.device)[:, None]
    row = start[..., None].expand_as(real)
    gone = static.gather(1, row)
    first = torch.where(real, at, real.shape[1])[:, None]  # (G, 1, T, P)
    first = first.masked_fill(~member[..., None], real.shape[1]).amin(2).clamp_max(real.shape[1] - 1)
    return Canvas(static, real & ~gone, torch.where(gone, row, at), torch.where(static, first, at))


def averaged(frames: Frames, canvas: Canvas, member: Tensor, count: Tensor) -> Tensor:
    """Returns the values `(G, T, P, D)` on the canvas, float32 at least: tokens that move, and means over a segment."""
    dtype = torch.promote_types(frames.tokens.dtype, torch.float32)
    weight, step = member.to(dtype), _step(frames.tokens, 2)
    made = torch.empty(frames.tokens.shape, dtype=dtype, device=frames.tokens.device)
    for first in range(0, frames.tokens.shape[2], step):
        own = slice(first, first + step)
        part = frames.tokens[:, :, own].to(dtype)
        mean = (weight @ part.flatten(2)).view_as(part) / count[:, :, own, None].clamp_min(1)
        made[:, :, own] = torch.where(canvas.static[:, :, own, None], mean, part)
    return made


class Clusters(NamedTuple):
    """`center (G, T, P)` bool; `score (G, T, P)` float64, that of the density peaks; `joins (G, T, P)` int64, the place of the center that an entry
    of the canvas belongs to, -1 for none."""

    center: Tensor
    score: Tensor
    joins: Tensor


def cluster_blocks(values: Tensor, canvas: Canvas, quotas: Tensor) -> Clusters:
    """Clusters every block by density peaks and turns centers into the plain means of their clusters, in place.

    Args:
        values: `(G, T, P, D)` on the canvas; rewritten.
        canvas: where they are.
        quotas: `(G, 2 T)` int64 clusters of each block: static and moving of the first row, of the second, ...

    Returns:
        The clusters. `O(T P^2 D)`, memory `CHUNK` numbers at a time.
    """
    shape = canvas.static.shape
    flat, static, moving = values.flatten(0, 1), canvas.static.flatten(0, 1), canvas.moving.flatten(0, 1)
    wanted = quotas.view(-1, 2)
    step = max(1, CHUNK // max(1, shape[2] * max(shape[2], flat.shape[2])))
    found = [
        _cluster_rows(*rows) for rows in zip(flat.split(step), static.split(step), moving.split(step), wanted.split(step), strict=True)
    ]
    return Clusters(*(torch.cat(parts).view(shape) for parts in zip(*found, strict=True)))


def _cluster_rows(values: Tensor, static: Tensor, moving: Tensor, wanted: Tensor) -> Clusters:
    """As `cluster_blocks` for rows `(R, P, D)`, two blocks in each."""
    places = values.shape[1]
    at = torch.arange(places, device=values.device)
    pair = (static[:, :, None] & static[:, None]) | (moving[:, :, None] & moving[:, None])
    distance = (euclidean(values) / values.shape[2] ** 0.5).masked_fill(~pair, torch.inf)
    near = distance.topk(min(NEIGHBOURS, places), dim=2, largest=False).values
    known = near.isfinite()
    density = (-torch.where(known, near.square(), 0).sum(2) / known.sum(2).clamp_min(1)).exp()
    denser = (density[:, None] > density[:, :, None]) | ((density[:, None] == density[:, :, None]) & (at < at[:, None]))
    farthest = torch.where(pair, distance, 0).amax(2)
    widest = torch.where(
        static, torch.where(static, farthest, 0).amax(1, keepdim=True), torch.where(moving, farthest, 0).amax(1, keepdim=True)
    )
    apart = torch.where(denser & pair, distance, torch.inf).amin(2)
    score = torch.where(apart.isinf(), widest, apart) * density
    center = topk_mask(score, static, wanted[:, 0]) | topk_mask(score, moving, wanted[:, 1])

    chosen = pair & center[:, None]
    joins = torch.where(chosen, distance, torch.inf).argmin(2)
    joins = torch.where(center, at, torch.where(chosen.any(2), joins, -1))
    share = ((joins[:, None] == at[:, None]) & (static | moving)[:, None]).to(values.dtype)  # (R, P center, P)
    total = share.sum(2)
    mean = (share @ values) / total.clamp_min(1)[..., None]
    values.copy_(torch.where((total > 1)[..., None], mean, values))
    return Clusters(center, score, joins)


class Merged(NamedTuple):
    """`keep (G, T, P)` bool over tokens of frames; `spot (G, T, P)` int64: which entry of the canvas `(T P)` a token stands for; `assign (G, T, P)`
    int64 into `T P`, the pivot of each token, -1 for none; `block (G, T, P)` int64, the block of a kept token; `values (G, T, P, D)` on the canvas;
    `start (G, T)` int64, the first frame of the segment of each frame."""

    keep: Tensor
    spot: Tensor
    assign: Tensor
    block: Tensor
    values: Tensor
    clusters: Clusters
    canvas: Canvas
    start: Tensor


@outside_autocast
def prunevid(frames: Frames, keep: Tensor | None, tau: float = 0.8, segment_ratio: float = 0.25, cluster_ratio: float = 0.5) -> Merged:
    """Merges what stands still in time, then what is alike in one block.

    Args:
        frames: tokens of each video by frame and place; computed in float32 at least.
        keep: `(G,)` int64 tokens to leave; None: as many as the released code at `cluster_ratio`.
        tau: cosine above which a place of a segment stands still.
        segment_ratio: segments per frame that are looked for.
        cluster_ratio: of the released code.

    Returns:
        What is left. `O(T^2 P D + T P^2 D)`, no host sync.
    """
    real, places = frames.real, frames.real.shape[2]
    present = real.any(2)
    start = segment_starts(frame_means(frames), present, segment_ratio)
    member = members_of(start, present)
    count, likeness = still(frames, member)
    static = likeness > tau
    if keep is not None:
        static = limited(static, likeness, count - 1, real.sum((1, 2)) - keep)
    canvas = canvas_of(real, start, member, static)
    values = averaged(frames, canvas, member, count)
    size = torch.stack([canvas.static.sum(2), canvas.moving.sum(2)], -1).flatten(1)
    quotas = authors_quotas(size, cluster_ratio) if keep is None else block_quotas(size, keep)
    clusters = cluster_blocks(values, canvas, quotas)

    at = torch.arange(places, device=real.device)
    row = canvas.home
    joins = clusters.joins.gather(1, row)  # (G, T, P): of the entry that each token went into
    spot = (row * places + joins.clamp_min(0)).flatten(1)
    target = canvas.pivot.flatten(1).gather(1, spot) * places + joins.clamp_min(0).flatten(1)
    known = real & (joins >= 0)
    assign = torch.where(known, target.view_as(joins), -1)
    own = torch.arange(real.shape[1] * places, device=real.device).view(1, -1, places)
    kept = known & (assign == own)
    block = 2 * row + canvas.moving.gather(1, row).long()
    return Merged(kept, row * places + at, assign, block, values, clusters, canvas, start)
