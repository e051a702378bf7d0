"""Bipartite soft matching: who merges into whom, merging, and undoing it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vtr.ops.fused import fused
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


def alternate_destinations(rank: Tensor, real: Tensor, keep: Tensor, shift: int = 0) -> Tensor:
    """Every second token in the order of `rank` is a destination: those with `rank + shift` odd.

    Where more must go than there are sources (rows with a budget below half of their tokens), `keep` evenly spaced ones are instead.

    Args:
        rank: `(B, T)` int64, dense ranks of the real tokens.
        real: `(B, T)` bool.
        keep: `(B,)` int64, tokens that are to stay.
        shift: protected tokens in front of the ranked ones.
    """
    destination = ((rank + shift) % 2 == 1) & real
    n = real.sum(1, keepdim=True).clamp_min(1)
    wanted = keep[:, None]
    spaced = ((rank + 1) * wanted // n > rank * wanted // n) & real
    return torch.where(destination.sum(1, keepdim=True) > wanted, spaced, destination)


def bipartite_match(metric: Tensor, source: Tensor, destination: Tensor, remove: Tensor) -> Match:
    """Merges the `remove` sources that are most similar to their nearest destination. Ties: lowest index. `O(T^2 d)`, no host sync.

    Args:
        metric: `(B, T, d)`, compared by cosine in float32; zero vectors have similarity 0 to everything.
        source: `(B, T)` bool, tokens that may go.
        destination: `(B, T)` bool, tokens that others may merge into; disjoint from `source`.
        remove: `(B,)` int64, how many go; at most as many as there are sources.

    Returns:
        `Match`; what is neither source nor destination stays as it is. With no destination in a row its sources are pruned (-1).
    """
    unit = F.normalize(metric.float(), dim=-1)
    score = (unit @ unit.mT).masked_fill_(~destination[:, None], -torch.inf)  # (B, T, T)
    similarity, into = score.max(dim=2)
    similarity = similarity.masked_fill(~source, -torch.inf)
    gone = topk_mask(similarity, source, remove)
    itself = torch.arange(metric.shape[1], device=metric.device).expand_as(into)
    into = torch.where(destination.any(1, keepdim=True), into, -1)
    return Match(~gone, torch.where(gone, into, itself), similarity)


def merge_tokens(tokens: Tensor, size: Tensor, assign: Tensor) -> tuple[Tensor, Tensor]:
    """Average of every pivot and what was merged into it, weighted by size.

    Args:
        tokens: `(B, T, D)`.
        size: `(B, T)` float32, original tokens that a token stands for.
        assign: `(B, T)` int64 pivots, -1 counts nowhere.

    Returns:
        Tokens `(B, T, D)` in their dtype and sizes `(B, T)` float32; pivots that nothing merged into, and all other rows, are unchanged.
        May run as one kernel.
    """
    if fused() and not (tokens.requires_grad and torch.is_grad_enabled()):  # the kernel has no gradient
        from vtr.ops._triton_rows import merged_tokens

        return merged_tokens(tokens, size, assign)
    weight = torch.where(assign >= 0, size, 0).double()  # float64 sums do not depend on the order of addition
    pivot = assign.clamp_min(0)
    total = torch.zeros_like(weight).scatter_add_(1, pivot, weight)
    absorbed = torch.zeros_like(weight).scatter_add_(1, pivot, (assign >= 0).double())
    where = pivot[..., None].expand(-1, -1, tokens.shape[2])
    summed = torch.zeros_like(tokens, dtype=torch.float64).scatter_add_(1, where, tokens.double() * weight[..., None])
    merged = absorbed > 1
    mean = (summed / total.clamp_min(1e-12)[..., None]).to(tokens.dtype)
    return torch.where(merged[..., None], mean, tokens), torch.where(merged, total.float(), size.float())


def unmerge_tokens(tokens: Tensor, assign: Tensor) -> Tensor:
    """Every token gets the value of its pivot: `(B, T, D)` from `tokens (B, T, D)` as `merge_tokens` returns them; -1 keeps its row."""
    itself = torch.arange(assign.shape[1], device=assign.device).expand_as(assign)
    where = torch.where(assign >= 0, assign, itself)
    return tokens.gather(1, where[..., None].expand_as(tokens))


def size_bias(size: Tensor) -> Tensor:
    """Proportional attention: `log(size)` as an additive key bias `(B, 1, 1, T)` on the scaled logits; `size (B, T)`."""
    return size.float().log()[:, None, None, :]
