"""PruneVid: average what stands still in a scene, cluster what is alike in a frame, and in the LLM keep what the question attends to.

Paper: Huang et al., ACL 2025, arXiv 2412.16117.
Code:  github.com/Visual-AI/PruneVid at b12600c, CC BY-NC-SA: nothing copied, checked against its outputs.
Stage: boundary, and prefill with `alpha`. Reads: visual tokens; text rows of one attention. Batch: any. Deterministic: yes.

1. Frames, described by the mean of their tokens, are clustered by density peaks; clusters are made contiguous, which gives segments.
2. A place of a segment stands still if the mean cosine between its tokens in two frames is above tau. Its tokens become their mean.
3. What stands still in a segment is one block, what moves in a frame another. Density peaks cluster every block of more than 14 tokens; a
   cluster becomes its plain mean, in the place of its center (what stood still: in the first frame of the segment).
4. At the input of LLM layer `layer` every block keeps the alpha of its tokens to which text behind the video pays most in the layer before,
   the most of any head and text token. What is dropped is dropped from the cache of earlier layers as well.

Paper to code: tau -> tau, temporal segment ratio -> segment_ratio, alpha -> alpha, layer 10 (after it) -> layer=11, cluster ratio -> what
`keep` makes it. k = 7, the number 14 and the runs of a cluster are only in the code.
Departures: the budget is exact. Step 4 leaves keep, step 3 keep / alpha: the cluster ratio is solved for that, by largest remainder over
blocks, small ones counting twice, so that they are whole where others keep half, the published ratio. If step 2 alone leaves fewer than that,
only the places that are most alike stand still. In LLMs of another depth than 32 layers `layer` is as deep in proportion. A segment of one
frame has nothing that stands still, where the code divides zero by zero. No noise is added to densities. Tokens keep the order of their places,
where the code sorts blocks and the clusters in them by score, which changes nothing but position numbers (`compat="authors"`). Both steps
renumber positions, where the code keeps the gaps of step 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.methods._frames import frames_of, merged_assign, merged_selection, order_by
from vtr.methods._prunevid import SMALL, Merged, prunevid
from vtr.ops.frames import Frames
from vtr.ops.gather import compaction, take
from vtr.ops.parts import members, topk_per_part
from vtr.ops.schedule import scaled_layers
from vtr.ops.topk import quota
from vtr.registry import register_method
from vtr.types import (
    VIDEO,
    Boundary,
    Budget,
    Card,
    Geometry,
    Layer,
    Merge,
    Method,
    PositionOption,
    Remove,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    at_least,
    check_choices,
    check_llm_layer,
)
from vtr.types.signals import TEXT, attention

BLOCK = "block"
PUBLISHED = 11  # of 32 layers
CLUSTER_RATIO = 0.5  # of the released code


class Published(NamedTuple):
    """What the released code makes of one video: `values (K, D)`, `block (K,)` int64 ascending, and per segment the tokens that stand still, those
    that move, and frames."""

    values: Tensor
    block: Tensor
    static: Tensor
    moving: Tensor
    window: Tensor


def authors_order(merged: Merged) -> Tensor:
    """Returns the order `(G, T P)` int64 of the released code, kept tokens in front: by block, and in one that was clustered by score."""
    keep, spot, block = (part.flatten(1) for part in (merged.keep, merged.spot, merged.block))
    size = torch.stack([merged.canvas.static.sum(2), merged.canvas.moving.sum(2)], -1).flatten(1)  # (G, 2 T)
    score = torch.where(size.gather(1, block) > SMALL, merged.clusters.score.flatten(1).gather(1, spot), 0.0)
    return order_by(keep, block, -score, spot)


def prunevid_authors(frames: Frames, tau: float, segment_ratio: float, cluster_ratio: float) -> Published:
    """Returns what the released code leaves of the first video of `frames` at the boundary, in its order; arguments as for `prunevid`."""
    merged = prunevid(frames, None, tau, segment_ratio, cluster_ratio)
    order = authors_order(merged)[0, : int(merged.keep[0].sum())]
    spot, block = merged.spot[0].flatten()[order], merged.block[0].flatten()[order]
    first, segment = merged.start[0].unique(return_inverse=True)  # (T,)
    static, moving = (torch.bincount(segment[block[block % 2 == kind] // 2], minlength=len(first)) for kind in (0, 1))
    return Published(merged.values[0].flatten(0, 1)[spot], block, static, moving, torch.bincount(segment))


def question_score(rows: Tensor, asked: Tensor) -> Tensor:
    """Returns the most `(G, N)` that any head and text token pays to a visual token.

    Args:
        rows: `(G, H, M, N)` attention of text tokens.
        asked: `(G, M)` bool, text tokens that count.
    """
    return rows.float().masked_fill(~asked[:, None, :, None], -torch.inf).amax((1, 2))


def attended_blocks(score: Tensor, block: Tensor, real: Tensor, keep: Tensor | None, blocks: int, alpha: float = 0.4) -> Tensor:
    """Keeps the best of every block, each in proportion to its tokens.

    Args:
        score: `(G, N)`, higher stays.
        block: `(G, N)` int64 from 0 to `blocks - 1`.
        real: `(G, N)` bool.
        keep: `(G,)` int64, shared out by largest remainder; None: alpha of every block, rounded down, as in the released code.
        blocks: how many there are at most.
        alpha: share of the released code.

    Returns:
        Keep mask `(G, N)` bool; ties go to the lowest index. `O(N log N + blocks N)`, no host sync.
    """
    size = members(block, real, blocks).sum(-1)
    share = (size.double() * alpha).long() if keep is None else quota(size.double(), size, keep)
    return topk_per_part(score, block, real, share)


@register_method("prunevid")
@dataclass(frozen=True, kw_only=True)
class PruneVid(Method):
    """The default budget is what the paper's settings leave of LLaVA-OneVision's videos, 17 %, with its alpha of 0.4 behind layer 10 of 32."""

    tau: float = 0.8
    segment_ratio: float = 0.25
    alpha: float | None = 0.4
    layer: int | None = None
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "prefill")
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.17)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="PruneVid: Visual Token Pruning for Efficient Video Large Language Models",
        paper="Huang et al., 2025",
        venue="ACL 2025",
        arxiv="2412.16117",
        code="github.com/Visual-AI/PruneVid (non-commercial, not used)",
        signals="visual tokens; text rows of the attention of one LLM layer",
        cost="distances between the tokens of a frame, O(T P^2 D), and text rows of one layer",
        needs_video=True,
        settings={
            "tau": "mean cosine between frames above which a place of a segment stands still",
            "segment_ratio": "segments per frame that are looked for",
            "alpha": "share of the merged tokens that stays behind `layer`; None merges to keep at the boundary and removes nothing in the LLM",
            "layer": "tokens that text attends to little are gone from the input of this layer on; None: 11 of 32, the paper's layer 10",
            "compat": "'authors': the released counts and order, whatever the budget",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)
        at_least(self, "layer", 1, ": attention is read in the layer before; alpha=None removes nothing in the LLM")
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"prunevid: alpha must be above 0 and at most 1, or None, got {self.alpha}; the authors use 0.4")
        if not 0 < self.segment_ratio <= 1:
            raise ValueError(f"prunevid: segment_ratio must be above 0 and at most 1, got {self.segment_ratio}; the authors use 0.25")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        exact = self.compat is None
        if not exact and self.budget != self.default_budget:
            raise ValueError(
                f"prunevid: compat='authors' keeps what tau, a cluster ratio of {CLUSTER_RATIO} and alpha leave, got {self.budget}; leave the "
                "budget out"
            )
        if self.alpha is None:
            return (Merge(Boundary(), self._merge, on=VIDEO, counted=exact),)
        layer = scaled_layers((PUBLISHED,), geometry.llm_layers)[0] if self.layer is None else self.layer
        check_llm_layer(self.name, layer, geometry, 1)
        rows = attention(layer - 1, TEXT, heads=True)
        return (
            Merge(Boundary(), self._merge, on=VIDEO, multiple=1 / self.alpha if exact else None, counted=exact),
            Remove(Layer(layer), partial(_prune, rows, None if exact else self.alpha), (rows,), on=VIDEO, earlier_keys=True, counted=exact),
        )

    def _merge(self, view: View) -> Selection:
        frames = frames_of(view)
        merged = prunevid(frames, view.keep if self.compat is None else None, self.tau, self.segment_ratio, CLUSTER_RATIO)
        keep, spot = frames.flat(merged.keep), frames.flat(merged.spot)
        view.per_token[BLOCK] = frames.flat(merged.block)
        if self.compat is not None:
            values = take(merged.values.flatten(1, 2), merged.spot.flatten(1)).view_as(frames.tokens).to(frames.tokens.dtype)
            return merged_selection(frames, merged.keep, values, merged.assign, authors_order(merged))
        assign = merged_assign(frames, merged.keep, merged.assign)
        index, _ = compaction(keep, view.most)
        made = take(merged.values.flatten(1, 2), take(spot, index)).to(view.tokens.dtype)
        tokens = view.tokens.scatter(1, index[..., None].expand_as(made), made)
        return Selection(keep=keep, tokens=tokens, assign=assign)


def _prune(rows: Signal, alpha: float | None, view: View) -> Selection:
    assert view.text is not None
    score = question_score(view.signals[rows], view.text.instruction)
    block = view.per_token.get(BLOCK, 2 * view.cells[..., 0] + 1)  # nothing had to be merged: every frame is a block of what moves
    if alpha is not None:
        return Selection(keep=attended_blocks(score, block, view.real, None, 2 * view.views, alpha))
    return Selection(keep=attended_blocks(score, block, view.real, view.keep, 2 * view.views))
