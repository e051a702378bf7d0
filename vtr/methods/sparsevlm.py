"""SparseVLM: prune in stages inside the LLM by the attention of the text that the image points at, and recycle part of what goes.

Paper: Zhang et al., ICML 2025, arXiv 2410.04417 v4, Section 3.
Code:  github.com/Gumpest/SparseVLMs at 26a5f48, Apache-2.0 (USE_VERSION=1_0): nothing copied, checked against its outputs.
Stage: boundary (observes), prefill. Reads: text rows of the attention of the layer before. Batch: any. Deterministic: yes.

1. Raters, once, on the input embeddings: softmax over the text behind the image of the raw dot products, mean over the visual tokens; text
   tokens above the mean rate.
2. After layers 2, 6 and 15 the score of a visual token is the attention it gets from the raters, mean over heads and raters.
3. The best k tokens stay. Of the P others the best `int(0.3 P) + 1` are recycled into `C = int(t / 10) + 1` clusters.
4. Clusters are density peaks (k = C nearest neighbours) on the layer's output; a cluster becomes the mean of its tokens.

Paper to code: tau -> RECYCLED, theta -> TOKENS_PER_CLUSTER, RETAIN_TOKN -> table.
Departures: k is solved so that k + C is exactly the budget of every stage (with the published tables that gives the published k), and at most
half of what stays are clusters. A merged token takes the place of its center; the code puts all behind the kept tokens (`compat="authors"`).
The code's random noise on the density is left out: ties go to the lowest index. Newlines and other images have no part in a score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.methods._schedule import Tabled
from vtr.ops.density_peaks import cluster_means, density_peaks
from vtr.ops.gather import left_align, take
from vtr.ops.raters import rated, rater_score, raters
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import (
    Boundary,
    Budget,
    Card,
    FrameOption,
    Geometry,
    Layer,
    Merge,
    Observe,
    PositionOption,
    Selection,
    Signal,
    Stage,
    Step,
    View,
)
from vtr.types.signals import TEXT, attention

PUBLISHED = (3, 7, 16)
N = 576
TABLES = {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)}
"""Nominal average -> tokens after each stage, kept and merged, of 576."""
RECYCLED = 0.3
TOKENS_PER_CLUSTER = 10


class Recycled(NamedTuple):
    """What step 3 and 4 make: `keep (G, N)` kept as they are; `recycled (G, T)` into N, best first, `real (G, T)`; their `cluster (G, T)`;
    `center (G, C)` into N and `center_real (G, C)`; `merged (G, C, D)` float64."""

    keep: Tensor
    recycled: Tensor
    real: Tensor
    cluster: Tensor
    center: Tensor
    center_real: Tensor
    merged: Tensor


def recycled_counts(pruned: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens recycled of `pruned` (int64) and the clusters they form, as in the code; 0 where nothing is pruned."""
    recycled = torch.where(pruned > 0, (pruned.double() * RECYCLED).long() + 1, 0)
    return recycled, torch.where(pruned > 0, recycled // TOKENS_PER_CLUSTER + 1, 0)


def kept_count(n: Tensor, keep: Tensor, most: int) -> Tensor:
    """Tokens kept as they are so that with the clusters of the rest there are `keep (G,)` of `n (G,)`; the most that fit, at least half."""
    kept = torch.arange(most + 1, device=n.device)
    clusters = recycled_counts((n[:, None] - kept).clamp_min(0))[1]
    fits = (kept + clusters <= keep[:, None]) & (kept <= n[:, None])
    return torch.maximum(torch.where(fits, kept, 0).amax(1), keep - keep // 2)


def recycle(
    tokens: Tensor, score: Tensor, real: Tensor, kept: Tensor, clusters: Tensor, width: int, most: int, noise: Tensor | None = None
) -> Recycled:
    """Steps 3 and 4.

    Args:
        tokens: `(G, N, D)`, the layer's output.
        score: `(G, N)`.
        real: `(G, N)` bool.
        kept, clusters: `(G,)` int64.
        width: an upper bound of the recycled tokens of a row, as a Python int; `most` one of its clusters.
        noise: `(G, T)` added to the density of the recycled tokens, best first.
    """
    keep = topk_mask(score, real, kept)
    pruned = real & ~keep
    recycled = torch.where(clusters > 0, recycled_counts(pruned.sum(1))[0], 0)
    score = score.to(torch.promote_types(score.dtype, torch.float32)).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    best_first = score.argsort(dim=1, descending=True, stable=True)
    place, _ = left_align(pruned.gather(1, best_first), min(width, real.shape[1]))
    index = best_first.gather(1, place)  # (G, T)
    valid = torch.arange(index.shape[1], device=index.device) < recycled[:, None]
    features = take(tokens, index)
    peaks = density_peaks(features, valid, clusters, most, noise=noise)
    merged = cluster_means(features, peaks.cluster, peaks.center.shape[1], eps=1e-6)
    return Recycled(keep, index, valid, peaks.cluster, index.gather(1, peaks.center), peaks.real, merged)


@register_method("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Tabled):
    """Version 1.5, which the ICML paper reports; the default budget is what its 192-token schedule leaves in the end, 113 of 576."""

    compat: Literal["authors"] | None = None

    tables, published, of = TABLES, PUBLISHED, N
    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "prefill")
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=TABLES[192][-1] / N)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
        paper="Zhang et al., 2025",
        venue="ICML 2025",
        arxiv="2410.04417",
        code="github.com/Gumpest/SparseVLMs (Apache-2.0, not used)",
        signals="input embeddings of text and image; attention of the text tokens in three layers",
        cost="text x visual products once; one slab of attention rows of three layers; T x T distances of the recycled tokens",
        needs_text=True,
        settings={
            "table": "published schedule whose shape is used: 192, 128, 96 or 64; None: the one nearest to the budget",
            "layers": "the three layers from whose input on tokens are gone (the paper's 2, 6, 15 plus 1); None: 3, 7, 16 of 32, same depth",
            "counts": "tokens after each stage, merged ones included, of an image with the most tokens of the model; instead of a budget",
            "compat": "authors: merged tokens behind the kept ones instead of at the place of their center",
        },
    )

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        layers, shares = self.schedule(geometry)
        stages = []
        for layer, share in zip(layers, shares, strict=True):
            rows = attention(layer - 1, queries=TEXT)
            stages.append(Merge(Layer(layer), partial(self._select, rows), (rows,), share=share))
        return Observe(Boundary(), _find_raters), *stages

    def _select(self, rows: Signal, view: View) -> Selection:
        score = rated(view.signals[rows], view.memory["raters"])
        n = view.real.sum(1)
        kept = kept_count(n, view.keep, view.most)
        width = max(int(count * RECYCLED) + 1 for count in view.counts)
        found = recycle(view.tokens, score, view.real, kept, view.keep - kept, width, min(view.most, width // TOKENS_PER_CLUSTER + 1))
        places = torch.where(found.center_real, found.center, view.real.shape[1])  # behind the last token: nowhere
        merged = found.merged.to(view.tokens.dtype)
        if self.compat == "authors":
            index, real = left_align(found.keep, view.most)
            index, real = torch.cat([index, found.center], 1), torch.cat([real, found.center_real], 1)
            tokens = torch.cat([take(view.tokens, index[:, : -merged.shape[1]]), merged], 1)
            order, real = left_align(real, view.most)
            index = index.gather(1, order)
            return Selection(index=index, real=real, tokens=take(tokens, order), order="given")
        tokens = torch.cat([view.tokens, view.tokens[:, :1]], 1)
        tokens = tokens.scatter(1, places[..., None].expand_as(merged), merged)[:, :-1]
        keep = torch.cat([found.keep, found.keep[:, :1]], 1).scatter(1, places, True)[:, :-1]
        own = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        into = torch.where(found.real, found.center.gather(1, found.cluster.clamp_min(0)), -1)
        spot = torch.where(found.real, found.recycled, keep.shape[1])
        assign = torch.where(found.keep, own, -1)
        assign = torch.cat([assign, assign[:, :1]], 1).scatter(1, spot, into)[:, :-1]
        return Selection(keep=keep, tokens=tokens, assign=assign)


def _find_raters(view: View) -> None:
    assert view.text is not None
    score = rater_score(view.tokens, view.text.tokens, view.real, view.text.instruction)
    view.memory["raters"] = raters(score, view.text.instruction)
