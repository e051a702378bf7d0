"""Every token joins the most similar of a few pivots."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vtr.ops.blocks import in_blocks
from vtr.ops.gather import group_sums, left_align, take
from vtr.ops.precision import widened
from vtr.ops.unit import unit_rows

Sum = Literal["add", "mean"]


class Joined(NamedTuple):
    """`pivot (G, C)` int64, pivots in position order (what follows is arbitrary), their values `(G, C, D)`, and `assign (G, N)` int64."""

    pivot: Tensor
    values: Tensor
    assign: Tensor


@in_blocks
def join_nearest(
    tokens: Tensor, metric: Tensor | None, pivot: Tensor, source: Tensor, kept: Tensor, most: int, merge: Sum = "mean", full: bool = False
) -> Joined:
    """Each source goes to the pivot of the highest cosine; ties: the first in position order.

    Args:
        tokens: `(G, N, D)`, any float dtype; sums in float32 at least.
        metric: `(G, N, d)`, compared in float32 at least; None = the tokens.
        pivot: `(G, N)` bool.
        source: `(G, N)` bool, tokens that join a pivot, none of them one itself.
        kept: `(G, N)` bool, tokens that stay, pivots among them.
        most: at least the pivots of a row, a Python int.
        merge: a pivot becomes itself plus the mean of its sources (add), or the mean of them and itself (mean).
        full: no row has padding, whose values must not count.

    Returns:
        `Joined`; in a row without pivots the sources are pruned (-1). `O(N most (d + D))`.
    """
    index, used = left_align(pivot, min(most, pivot.shape[1]))
    unit, wide = unit_rows(tokens if metric is None else metric), widened(tokens)
    slot = (unit @ take(unit, index).mT).masked_fill_(~used[:, None], -torch.inf).argmax(2)  # (G, N)
    into = torch.where(used.any(1, keepdim=True) & source, index.gather(1, slot), -1)
    assign = torch.where(kept, torch.arange(pivot.shape[1], device=pivot.device), into)

    total, members = group_sums(wide, torch.where(source, slot, -1), index.shape[1], full)
    own, number = take(wide, index), members[..., None]
    values = own + total / number.clamp_min(1) if merge == "add" else (own + total) / (number + 1)
    return Joined(index, torch.where(used[..., None], values, own).to(tokens.dtype), assign)


def put(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Writes `values (G, C, D)` into `base (G, N, D)` at `index (G, C)`, and returns it."""
    return base.scatter_(1, index[..., None].expand_as(values), values)
