"""ToMe: merge the most similar visual tokens a little in every layer of the vision tower.

Paper: Bolya et al., ICLR 2023, arXiv 2210.09461, Section 3.
Code:  github.com/facebookresearch/ToMe at af95e4b, CC BY-NC: nothing copied, checked against its outputs.
Stage: tower, between attention and MLP. Reads: keys of the layer, sizes. Batch: any. Deterministic: yes.

1. The tokens of a view, prefix tokens included, are numbered; even ones are sources (set A), odd ones destinations (set B). Prefix tokens
   never merge and are never merged into.
2. Every source finds the destination whose key (mean over heads) has the highest cosine with its own.
3. The r sources with the highest similarity merge into their destinations: the mean weighted by size; the sizes add up.
4. What is left is numbered anew: sources first, then destinations. The next layer splits by these numbers.
5. From the first merge on, attention adds log(size) to the logits of each key (proportional attention).

Paper to code: r -> removals per layer, from the budget; s -> size; A, B -> source, destination.
Departures: the budget is exact (r is a list that sums to N - keep: rounded down, early layers get the remainder); without a CLS token
sources left over keep their order (the authors' are reordered by similarity, `compat="authors"`); in a row where more than half must go at
once, the destinations are evenly spaced instead; merged tokens take the place and position of their destination. Where several patches are
joined to a token they merge together, by their keys side by side; keys are those that the attention sees, rotary positions included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.ops.bipartite import alternate_destinations, bipartite_match, dense_rank, match_halves, merge_rows, merge_tokens
from vtr.ops.fused import fused
from vtr.registry import register_method
from vtr.types import Budget, Card, FrameOption, Geometry, Merge, Method, Selection, Signal, Stage, Step, Tower, View
from vtr.types.signals import keys

FINE = 10_000
"""Tokens of an image that stands for those of any size, where a tower has no one grid."""


def tome(
    tokens: Tensor,
    metric: Tensor,
    size: Tensor,
    real: Tensor,
    keep: Tensor,
    number: Tensor,
    shift: int = 1,
    reorder: bool = False,
    known: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer's merge.

    Args:
        tokens: patches `(G, N, D)` of each view, without prefix tokens.
        metric: `(G, N, d)`, keys averaged over heads.
        size: `(G, N)` float32, patches that a token stands for.
        real: `(G, N)` bool, tokens that take part.
        keep: `(G,)` int64, tokens that are to stay of `real`.
        number: `(G, N)` int64, order of the tokens (step 4); only the order counts.
        shift: prefix tokens in front, which shift the even/odd split.
        reorder: number unmerged sources by falling similarity, as the authors do without a CLS token.
        known: `real.sum(1)` and `keep` as Python ints, so that only sources and destinations are compared, and only what merges is read.

    Returns:
        Keep mask `(G, N)`, merged tokens `(G, N, D)` (kept rows count), `assign (G, N)` int64, and the new numbers `(G, N)`.
    """
    most = None if known is None else _most(*known, shift)
    if most is not None and most.alike and set(known[0]) == {real.shape[1]}:  # type: ignore[index]
        return _uniform(tokens, metric, size, number, most, shift, reorder)
    rank = dense_rank(number, real)
    destination = alternate_destinations(rank, real, keep, shift, spaced=most is None or most.spaced)
    remove = real.sum(1) - keep
    match = bipartite_match(metric, real & ~destination, destination, remove, most and (most.sources, most.destinations))
    assign = torch.where(real, match.assign, -1)
    merged, _ = merge_tokens(tokens, size, assign, most and (most.removed, most.destinations))
    numbered = rank
    if reorder:
        order = match.similarity.argsort(dim=1, descending=True, stable=True)
        position = torch.arange(real.shape[1], device=real.device).expand_as(rank)
        numbered = torch.where(destination, rank, torch.empty_like(order).scatter_(1, order, position))
    numbered = torch.where(remove[:, None] > 0, numbered + destination.long() * real.shape[1], rank)
    return match.keep & real, merged, assign, numbered


def _uniform(
    tokens: Tensor, metric: Tensor, size: Tensor, number: Tensor, most: _Most, shift: int, reorder: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`tome` of full rows that all lose as many tokens, at most half of them."""
    order = number.argsort(dim=1, stable=True)
    itself = torch.arange(order.shape[1], device=order.device).expand_as(order)
    found = match_halves(metric, order, shift % 2, most.removed)
    keep = torch.ones_like(found.destination).scatter_(1, found.of, False)
    assign = itself.scatter(1, found.of, found.into)
    if fused():
        merged, _ = merge_tokens(tokens, size, assign)
    else:
        merged, _ = merge_rows(tokens, size, found.of, found.into, min(most.removed, most.destinations))
    if reorder:
        rank = found.source.gather(1, found.similarity.argsort(dim=1, descending=True, stable=True))
        number = number.scatter(1, rank, itself[:, : rank.shape[1]])
    return keep, merged, assign, number + found.destination * (1 + number.amax(1, keepdim=True))


class _Most(NamedTuple):
    """The most sources, destinations and removed tokens of a row; whether the destinations of one are spaced; whether all rows are alike."""

    sources: int
    destinations: int
    removed: int
    spaced: bool
    alike: bool


def _most(counts: Sequence[int], keeps: Sequence[int], shift: int) -> _Most:
    odd = [(count + shift) // 2 - shift // 2 for count in counts]
    to = [min(every_second, keep) for every_second, keep in zip(odd, keeps, strict=True)]
    sources, removed = (max(n - m for n, m in zip(counts, fewer, strict=True)) for fewer in (to, keeps))
    alike = len(set(counts)) == len(set(keeps)) == 1 and to == odd and removed > 0
    return _Most(sources, max(to), removed, to != odd, alike)


def merge_schedule(n: int, keep: int, layers: int, inflect: float = 0.0) -> list[int]:
    """How many of a view's tokens merge in each layer: as even as `inflect` asks for, summing exactly to `n - keep`.

    Args:
        n, keep: tokens before and after.
        layers: layers that may merge.
        inflect: 0 constant, -1 falling linearly to 0 in the last layer, 1 rising from 0.

    Returns:
        One count per layer, at most half of what the layer gets.

    Raises:
        ValueError: halving in every layer does not reach `keep`.
    """
    least = n
    for _ in range(layers):
        least = -(-least // 2)
    if keep < least:
        raise ValueError(
            f"tome: {keep} of the {n} tokens of a view are out of reach: a layer merges at most half of what it gets, so {layers} layers "
            f"leave at least {least} per view; keep {least} or more per view, or use a boundary method"
        )
    total = n - keep
    weight = [1 - inflect + 2 * inflect * (layer / (layers - 1) if layers > 1 else 0.5) for layer in range(layers)]
    planned = [int(total * w / sum(weight)) for w in weight]
    rest = total - sum(planned)
    left, counts = n, []
    for layer, count in enumerate(planned):
        wanted = left - count - (layer < rest)
        wanted = min(wanted, keep * 2 ** (layers - 1 - layer))  # the layers after this one can only halve
        after = max(wanted, -(-left // 2), keep)
        counts.append(left - after)
        left = after
    counts[-1] += left - keep
    return counts


def shares(counts: Sequence[int]) -> list[float]:
    """What each layer of a schedule leaves, as the share of the way from keep (0) to N (1); the last is exactly 0."""
    total = sum(counts)
    return [sum(counts[layer + 1 :]) / total if total else 0.0 for layer in range(len(counts))]


@register_method("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Merges in every layer up to the one whose output is used; the default budget is a third, the 192 of 576 of most tables."""

    inflect: float = 0.0
    proportional: bool = True
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("tower",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    card: ClassVar[Card] = Card(
        title="Token Merging: Your ViT But Faster",
        paper="Bolya et al., 2023",
        venue="ICLR 2023",
        arxiv="2210.09461",
        code="github.com/facebookresearch/ToMe (CC BY-NC, not used)",
        signals="keys of every tower layer",
        cost="one (N, N) product of head-averaged keys per layer",
        settings={
            "inflect": "schedule over the layers: 0 constant, -1 falls linearly to 0, 1 rises from 0",
            "proportional": "add log(size) to the attention logits of merged tokens",
            "compat": "'authors' numbers the unmerged sources of towers without CLS by similarity, as the released code does",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.inflect <= 1:
            raise ValueError(f"tome: inflect must be from -1 (falling) to 1 (rising), got {self.inflect}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        depth = geometry.feature_layer + 1
        if geometry.patch_grid is None:  # every image has its own: the shares of a large one, which others round
            assert self.budget is not None
            n, keep = FINE, max(round(FINE * (self.budget.keep_ratio or 1 / 2)), -(-FINE // 2**depth))
        else:
            n = geometry.patch_grid[0] * geometry.patch_grid[1]
            keep = self._view_keep(n, geometry.most_tokens or n)
        counts = merge_schedule(n, keep, depth, self.inflect)
        layers = [layer for layer, count in enumerate(counts) if count] or [0]
        left = shares(counts)
        return tuple(self._step(layer, left[layer], geometry) for layer in layers)

    def _step(self, layer: int, share: float, geometry: Geometry) -> Step:
        key = keys(layer)
        reorder = self.compat is not None and not geometry.has_cls
        select = partial(_select, key=key, shift=geometry.prefix_tokens, reorder=reorder)
        return Merge(Tower(layer, at="mlp"), select, (key,), share=share, per="view", proportional=self.proportional)

    def _view_keep(self, n: int, most_tokens: int) -> int:
        """Tokens left of a full view of `n` when the image has as many views as it can; the schedule's shape is made for that."""
        assert self.budget is not None
        if self.budget.keep_ratio is not None:
            return self.budget.resolve(n)
        whole = self.budget.keep if self.budget.keep is not None else int(self.budget.average_keep or 1)
        return min(max(whole * n // max(most_tokens, n), 1), n)


def _select(view: View, key: Signal, shift: int, reorder: bool) -> Selection:
    metric = view.signals[key].float().mean(2)  # (G, N, d)
    number = view.per_token.get("number")
    if number is None:
        number = torch.arange(view.real.shape[1], device=view.tokens.device).expand_as(view.real)
    known = view.counts, view.keeps
    keep, tokens, assign, number = tome(view.tokens, metric, view.sizes, view.real, view.keep, number, shift, reorder, known)
    view.per_token["number"] = number
    return Selection(keep=keep, tokens=tokens, assign=assign)
