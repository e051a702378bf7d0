"""Bipartite soft matching: who merges into whom, merging, and undoing it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vtr.ops.fused import fused
from vtr.ops.gather import left_align, take
from vtr.ops.topk import topk_mask


class Match(NamedTuple):
    """Result of `bipartite_match`, all over the T input tokens.

    `keep (B, T)` bool: what stays; `assign (B, T)` int64: the pivot a token was merged into (a token that stays names itself, -1 = pruned
    or not real); `similarity (B, T)` float32: of a source to its nearest destination, -inf elsewhere.
    """

    keep: Tensor
    assign: Tensor
    similarity: Tensor


def dense_rank(rank: Tensor, real: Tensor) -> Tensor:
    """Ranks 0, 1, 2, ... of the real entries in the order of `rank (B, T)` (ties: lowest index); entries that are not real come last."""
    order = torch.where(real, rank, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(rank.shape[1], device=rank.device).expand_as(order))


def alternate_destinations(rank: Tensor, real: Tensor, keep: Tensor, shift: int = 0, *, spaced: bool = True) -> Tensor:
    """Every second token in the order of `rank` is a destination: those with `rank + shift` odd.

    Where more must go than there are sources (rows with a budget below half of their tokens), `keep` evenly spaced ones are instead.

    Args:
        rank: `(B, T)` int64, dense ranks of the real tokens.
        real: `(B, T)` bool.
        keep: `(B,)` int64, tokens that are to stay.
        shift: protected tokens in front of the ranked ones.
        spaced: False where it is known that no row has a budget that small.
    """
    destination = ((rank + shift) % 2 == 1) & real
    if not spaced:
        return destination
    n = real.sum(1, keepdim=True).clamp_min(1)
    wanted = keep[:, None]
    evenly = ((rank + 1) * wanted // n > rank * wanted // n) & real
    return torch.where(destination.sum(1, keepdim=True) > wanted, evenly, destination)


def bipartite_match(metric: Tensor, source: Tensor, destination: Tensor, remove: Tensor, most: tuple[int, int] | None = None) -> Match:
    """Merges the `remove` sources that are most similar to their nearest destination. Ties: lowest index. No host sync.

    Args:
        metric: `(B, T, d)`, compared by cosine in float32; zero vectors have similarity 0 to everything.
        source: `(B, T)` bool, tokens that may go.
        destination: `(B, T)` bool, tokens that others may merge into; disjoint from `source`.
        remove: `(B,)` int64, how many go; at most as many as there are sources.
        most: the most sources and destinations of a row, as Python ints; None = T. Only so many are compared: `O(sources destinations d)`.

    Returns:
        `Match`; what is neither source nor destination stays as it is. With no destination in a row its sources are pruned (-1).
    """
    length = metric.shape[1]
    unit = F.normalize(metric.float(), dim=-1)
    itself = torch.arange(length, device=metric.device).expand(len(metric), -1)
    if most is None or 0 in most:
        score = (unit @ unit.mT).masked_fill_(~destination[:, None], -torch.inf)  # (B, T, T)
        similarity, into = score.max(dim=2)
        similarity = similarity.masked_fill(~source, -torch.inf)
    else:
        of, asks = left_align(source, min(most[0], length))  # in position order, so that ties go to the lowest index
        to, there = left_align(destination, min(most[1], length))
        score = (take(unit, of) @ take(unit, to).mT).masked_fill_(~there[:, None], -torch.inf)  # (B, sources, destinations)
        nearest, at = score.max(dim=2)
        similarity = torch.full(source.shape, -torch.inf, device=unit.device).scatter(1, of, nearest.masked_fill(~asks, -torch.inf))
        into = itself.scatter(1, of, to.gather(1, at))
    gone = topk_mask(similarity, source, remove)
    into = torch.where(destination.any(1, keepdim=True), into, -1)
    return Match(~gone, torch.where(gone, into, itself), similarity)


class Halves(NamedTuple):
    """Result of `match_halves`: `of` and `into (B, R)` int64, the tokens that go and their pivots; `destination (B, T)` bool, who may be one;
    `source (B, S)` int64, who may go, and `similarity (B, S)` float32 of each to its nearest destination."""

    of: Tensor
    into: Tensor
    destination: Tensor
    source: Tensor
    similarity: Tensor


def match_halves(metric: Tensor, order: Tensor, first: int, remove: int) -> Halves:
    """`bipartite_match` of full rows that all lose as many tokens, every second one of which is a source: half of it by half of it is compared.

    Args:
        metric: `(B, T, d)`, as for `bipartite_match`.
        order: `(B, T)` int64, the tokens in the order that says which is a source.
        first: number in it of the first source, 0 or 1.
        remove: how many go, at most as many as there are sources.
    """
    unit = F.normalize(metric.float(), dim=-1)
    source, to = (
        order[:, first::2].sort(1).values,
        order[:, 1 - first :: 2].sort(1).values,
    )  # in position order: ties go to the lowest index
    similarity, nearest = (take(unit, source) @ take(unit, to).mT).max(dim=2)
    best = similarity.argsort(dim=1, descending=True, stable=True)[:, :remove]
    destination = torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(1, to, True)
    return Halves(source.gather(1, best), to.gather(1, nearest.gather(1, best)), destination, source, similarity)


def merge_tokens(tokens: Tensor, size: Tensor, assign: Tensor, most: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Average of every pivot and what was merged into it, weighted by size. Only pivots are computed, and only what merges is read.

    Args:
        tokens: `(B, T, D)`.
        size: `(B, T)` float32, original tokens that a token stands for.
        assign: `(B, T)` int64 pivots, each of which names itself; -1 counts nowhere.
        most: the most tokens of a row that go, and pivots that take some in, as Python ints; None = T - 1.

    Returns:
        Tokens `(B, T, D)` in their dtype and sizes `(B, T)` float32; pivots that nothing merged into, and all other rows, are unchanged.
        May run as one kernel.
    """
    if fused() and not (tokens.requires_grad and torch.is_grad_enabled()):  # the kernel has no gradient
        from vtr.ops._triton_rows import merged_tokens

        return merged_tokens(tokens, size, assign)
    length = tokens.shape[1]
    goes, takes = (max(length - 1, 1),) * 2 if most is None else (min(max(some, 1), length) for some in most)
    itself = torch.arange(length, device=tokens.device)
    of, gone = left_align((assign != itself) & (assign >= 0), goes)  # (B, R)
    return merge_rows(tokens, size, of, torch.where(gone, assign.gather(1, of), length), min(goes, takes), gone)


def merge_rows(tokens: Tensor, size: Tensor, of: Tensor, into: Tensor, takes: int, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`merge_tokens` where it is known which tokens go.

    Args:
        tokens, size: as for `merge_tokens`.
        of, into: `(B, R)` int64, the tokens that go and their pivots.
        takes: at least the pivots of a row.
        gone: `(B, R)` bool, entries that count; None for all. Those that do not go into T.

    Returns:
        Tokens `(B, T, D)` and sizes `(B, T)` float32.
    """
    rows, length, width = tokens.shape
    absorbs = torch.zeros(rows, length + 1, dtype=torch.bool, device=tokens.device).scatter_(1, into, True)[:, :length]
    pivot, merged = left_align(absorbs, min(takes, length))  # (B, P)
    start = torch.arange(-1, rows * pivot.shape[1] - 1, pivot.shape[1], device=tokens.device)[:, None]
    slot = (absorbs.cumsum(1).gather(1, into if gone is None else into.clamp_max(length - 1)) + start).clamp_min(0).flatten()
    weight, own, joins = size.gather(1, of).double(), size.gather(1, pivot), take(tokens, of)
    if gone is not None:
        weight, joins = torch.where(gone, weight, 0), joins.masked_fill(~gone[..., None], 0)
    # float64 sums do not depend on the order of addition
    total = own.double().view(-1).index_add(0, slot, weight.view(-1)).view_as(pivot)
    first = take(tokens, pivot)  # (B, P, D)
    summed = (first.double() * own[..., None]).flatten(0, 1).index_add(0, slot, (joins * weight[..., None]).flatten(0, 1))
    mean = (summed.view(rows, -1, width) / total[..., None]).to(tokens.dtype)
    mean = torch.where(merged[..., None], mean, first)
    sizes = size.float().scatter(1, pivot, torch.where(merged, total, own).float())
    return tokens.scatter(1, pivot[..., None].expand_as(mean), mean), sizes


def unmerge_tokens(tokens: Tensor, assign: Tensor) -> Tensor:
    """Every token gets the value of its pivot: `(B, T, D)` from `tokens (B, T, D)` as `merge_tokens` returns them; -1 keeps its row."""
    itself = torch.arange(assign.shape[1], device=assign.device).expand_as(assign)
    where = torch.where(assign >= 0, assign, itself)
    return tokens.gather(1, where[..., None].expand_as(tokens))


def size_bias(size: Tensor) -> Tensor:
    """Proportional attention: `log(size)` as an additive key bias `(B, 1, 1, T)` on the scaled logits; `size (B, T)`."""
    return size.float().log()[:, None, None, :]
