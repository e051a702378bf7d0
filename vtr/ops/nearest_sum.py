"""Tokens that take in their nearest neighbours, and the one-head attention that weighs them (PruMerge)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.gather import take
from vtr.ops.precision import widened
from vtr.ops.topk import topk_mask
from vtr.ops.unit import unit_rows


def one_head_row(logits: Tensor, weights: Tensor, real: Tensor) -> Tensor:
    """The attention row of one head as wide as all heads together, from the rows of the heads.

    Its logits are the sum of the heads' unscaled products times `(H d)^-0.5`. What the softmax ran over beyond the real tokens (the CLS
    token, padding) is known by the weight it took from them in each head and counts as one key.

    Args:
        logits: `(G, H, N)` scaled logits of each head.
        weights: `(G, H, N)` the same after the softmax over all keys.
        real: `(G, N)` bool.

    Returns:
        `(G, N)` float64, 0 where not real; rows sum to at most 1. `O(H N)`.
    """
    there, heads = real[:, None], logits.shape[1]
    logits, share = logits.double(), torch.where(there, weights.double(), 0)
    peak = share.argmax(2, keepdim=True)  # the total is best known where the weight is largest
    total = logits.gather(2, peak) - share.gather(2, peak).log()
    log_share = (logits - total).masked_fill(~there, -torch.inf)  # also where the weight itself is too small for float32
    rest = (1 - log_share.exp().sum(2)).clamp_min(torch.finfo(weights.dtype).eps).log()
    both = torch.cat([log_share.sum(1), rest.sum(1, keepdim=True)], 1) / heads**0.5
    return torch.where(real, both.softmax(1)[:, :-1], 0)


def add_nearest(tokens: Tensor, metric: Tensor, weight: Tensor, index: Tensor, real: Tensor, neighbours: int, full: bool = False) -> Tensor:
    """`tokens[i]` plus the weighted sum of the tokens nearest to it by cosine; all sums read the tokens as they came.

    Args:
        tokens: `(G, N, D)`.
        metric: `(G, N, d)`, compared by cosine in float32.
        weight: `(G, N)` of each token in a sum; not normalised.
        index: `(G, K)` int64, the tokens that take in others.
        real: `(G, N)` bool, tokens that can be taken in; never the token itself.
        neighbours: how many; fewer where a row has fewer. Ties: lowest index.
        full: every entry is real, as the host knows.

    Returns:
        `(G, K, D)` float32 (float64 stays). `O(K N (d + D))`, no host sync.
    """
    wide, unit = widened(tokens), unit_rows(metric)
    similarity = take(unit, index) @ unit.mT  # (G, K, N)
    may = real[:, None].expand_as(similarity).scatter(2, index[..., None], False)
    rows, n = similarity.shape[:2], similarity.shape[2]
    keep = may.sum(2).clamp_max(neighbours).flatten()
    near = topk_mask(similarity.flatten(0, 1), may.flatten(0, 1), keep, most=neighbours).view(*rows, n)
    weights = torch.where(near, weight.to(wide.dtype)[:, None], 0)
    return take(wide, index) + weights @ (wide if full else wide.masked_fill(~real[..., None], 0))
