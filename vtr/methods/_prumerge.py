"""What PruMerge and PruMerge+ share: everything but which tokens are kept. Not a method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.ops.blocks import in_blocks
from vtr.ops.gather import left_align, take
from vtr.ops.joining import put
from vtr.ops.nearest_sum import add_nearest, one_head_row
from vtr.ops.outliers import upper_fence
from vtr.ops.precision import widened
from vtr.types import Boundary, FrameOption, Geometry, Merge, Method, PositionOption, Remove, Selection, Signal, Step, View, VtrError
from vtr.types.signals import cls_row, keys

PLACE = "place"  # of a token in the authors' order, per token


class Chosen(NamedTuple):
    """Tokens that take in their neighbours: `top (G, N)` bool by attention, `spread (G, N)` bool by place, at most `most` of a row."""

    top: Tensor
    spread: Tensor
    most: int


class Merged(NamedTuple):
    """Keep mask `(G, N)`, tokens `(G, N, D)` (kept rows count), `assign (G, N)` int64 and `extra (G, N)`, True on the token of the rest."""

    keep: Tensor
    tokens: Tensor
    assign: Tensor
    extra: Tensor


def merge_chosen(
    tokens: Tensor,
    keys: Tensor,
    attention: Tensor,
    real: Tensor,
    chosen: Tensor,
    most: int,
    empty: Tensor,
    neighbours: int = 32,
    full: bool = False,
) -> Merged:
    """Adds to every chosen token its nearest others, and makes one token of the rest.

    Args:
        tokens: `(G, N, D)`, one row per view.
        keys: `(G, N, C)`, heads side by side; neighbours are nearest by cosine.
        attention: `(G, N)` from CLS, the weight of a token in every sum.
        real: `(G, N)` bool.
        chosen: `(G, N)` bool. A row whose tokens are all chosen is left as it is.
        most: the most chosen tokens of a row that is not, a Python int.
        empty: `(G,)` bool, rows that keep nothing.
        neighbours: how many others a chosen token takes in.
        full: every entry is real, as the host knows.

    Returns:
        `Merged`. The rest takes the place of its most attended token. `O(N most (C + D))`, no host sync.
    """
    whole = (chosen | ~real).all(1, keepdim=True)
    rest = real & ~chosen & ~empty[:, None]
    itself = torch.arange(real.shape[1], device=real.device)
    best = torch.where(rest, attention, -torch.inf).argmax(1, keepdim=True)
    extra = (itself == best) & rest
    index, values = _sums(tokens, keys, attention, real, chosen & ~whole, rest, best, min(most, real.shape[1]), neighbours, full)
    assign = torch.where(chosen & real, itself, torch.where(rest, best, -1))
    return Merged((chosen & real) | extra, put(tokens.clone(), index, values), assign, extra)


@in_blocks
def _sums(
    tokens: Tensor,
    keys: Tensor,
    attention: Tensor,
    real: Tensor,
    chosen: Tensor,
    rest: Tensor,
    best: Tensor,
    most: int,
    neighbours: int,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """Returns where new values stand, `(G, 1 + most)` int64, and the values: that of the rest, and those of the chosen tokens in position order."""
    wide = widened(tokens)
    index, used = left_align(chosen, most)
    grown = add_nearest(tokens, keys, attention, index, real, neighbours, full)
    share = torch.where(rest, attention, 0).to(wide.dtype)
    remains = share[:, None] @ (wide if full else wide.masked_fill(~real[..., None], 0))  # (G, 1, D)
    remains = torch.where(rest.any(1)[:, None, None], remains, take(wide, best))
    index = torch.cat([best, torch.where(used, index, best)], 1)  # whoever stands there twice has one value
    return index, torch.cat([remains, torch.where(used[..., None], grown, remains)], 1).to(tokens.dtype)


def outliers(attention: Tensor, real: Tensor) -> Tensor:
    """`(G, N)` bool: attention strictly above `Q3 + 1.5 IQR` of its row; never more than a quarter of a row."""
    return (attention > upper_fence(attention, real)[:, None]) & real


@dataclass(frozen=True, kw_only=True)
class Merging(Method):
    """The steps of both; a subclass says which tokens are chosen. Without a budget the number of tokens follows the image."""

    neighbours: int = 32
    compat: Literal["authors"] | None = None

    takes_budget: ClassVar[bool] = True
    published_positions: ClassVar[PositionOption] = "renumber"
    frames_unless_told: ClassVar[FrameOption] = "each"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise ValueError(f"{self.name}: neighbours must be an integer, 0 or more, got {self.neighbours!r}; the authors use 32")

    def choose(self, attention: Tensor, real: Tensor, keep: Tensor | None, most: int) -> Chosen:
        """Which tokens stay, `keep - 1` of them, or by their outliers when `keep` is None. `most` is the largest keep, or number of tokens."""
        raise NotImplementedError

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        last = geometry.tower_layers - 1
        needs = cls_row(last, heads=True, softmax=False), cls_row(last, heads=True), keys(last, tower=True)
        merge = Merge(Boundary(before_projector=True), partial(self._merge, *needs), needs, counted=self.budget is not None, per="view")
        if self.compat is None:
            return (merge,)
        if geometry.anyres:
            raise VtrError(f"{self.name}: compat='authors' knows images of one view only, {geometry.host!r} has crops; leave compat out")
        return merge, Remove(Boundary(), _reorder, counted=False)

    def _merge(self, logits: Signal, weights: Signal, key: Signal, view: View) -> Selection:
        attention = one_head_row(view.signals[logits], view.signals[weights], view.real)
        exact = self.budget is not None
        chosen = self.choose(attention, view.real, view.keep if exact else None, view.most if exact else max(view.counts))
        kept = chosen.top | chosen.spread
        empty = view.keep == 0 if exact else ~view.real.any(1)
        if exact:
            kept = kept | (view.real & (view.keep == view.real.sum(1))[:, None])
        keys = view.signals[key].flatten(2)
        merged = merge_chosen(view.tokens, keys, attention, view.real, kept, chosen.most, empty, self.neighbours, view.full)
        if self.compat is not None:
            n = view.real.shape[1]
            falling = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            position = torch.arange(n, device=falling.device)
            place = torch.where(chosen.top, falling, n + position)  # top by attention, then by position
            view.per_token[PLACE] = torch.where(merged.extra, 2 * n, place)
        return Selection(keep=merged.keep, tokens=merged.tokens, assign=merged.assign)


def _reorder(view: View) -> Selection:
    """The authors' order in the LLM: top tokens by falling attention, the spread ones, the rest."""
    place = view.per_token[PLACE].masked_fill(~view.real, torch.iinfo(torch.int64).max)
    width = max(view.counts)
    index = place.argsort(dim=1, stable=True)[:, :width]
    there = torch.arange(width, device=place.device) < view.real.sum(1, keepdim=True)
    return Selection(index=index, real=there, order="given")
