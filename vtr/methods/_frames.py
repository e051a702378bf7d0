"""What methods for videos share: their View frame by frame."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtr.ops.frames import Frames, by_frame
from vtr.ops.gather import take
from vtr.ops.schedule import scaled_layers
from vtr.types import VIDEO, Boundary, Geometry, Layer, Merge, Method, Remove, Selection, Signal, Step, View, VtrError, check_llm_layer
from vtr.types.signals import attention, received


def frames_of(view: View) -> Frames:
    """Returns the tokens of a View of videos by frame and place in the frame, see `vtr.ops.frames.by_frame`."""
    grids = [view.grid(group) for group in range(len(view.grids))]
    frames = [len(own) for own in view.grids]
    size = view.real.shape[1]
    return by_frame(view.tokens, view.real, view.cells, grids, frames, whole=all(count == size for count in view.counts))


def refuse_authors(method: Method, reason: str) -> None:
    """Refuses `compat="authors"` on a model for a method whose released code cannot run there.

    Args:
        method: with a setting `compat`.
        reason: why, for the message.

    Raises:
        VtrError: it is set.
    """
    if getattr(method, "compat", None) == "authors":
        raise VtrError(
            f"{method.name}: compat='authors' cannot run on a model: {reason}; the pure functions and scripts/replay have it; leave compat out to "
            "reduce a model"
        )


def authors_ratio(method: Method) -> float:
    """Returns the share of tokens that the released code of a method is told to keep; what it makes of it is its own.

    Raises:
        ValueError: the budget is no share.
    """
    ratio = None if method.budget is None else method.budget.keep_ratio
    if ratio is None:
        raise ValueError(
            f"{method.name}: compat='authors' keeps what the released code makes of keep_ratio, got {method.budget}; give keep_ratio, or leave "
            "compat out"
        )
    return ratio


def outer_then_inner(
    method: Any,
    geometry: Geometry,
    outer: Callable[[Signal, View], Selection],
    inner: Callable[[Signal, View], Selection],
    published: int,
    kind: type[Merge] | type[Remove],
    symbol: str = "",
) -> tuple[Step, ...]:
    """Returns the steps of a method that merges in front of the LLM by attention of the tower, and goes on in a late layer by the last token's.

    Args:
        method: with settings `inner_ratio`, the share that the second step leaves (1 = there is none), `layer` and `compat`.
        geometry: of the model.
        outer, inner: what both steps do, given the signal that they read.
        published: layer of 28 of the second step; others are as deep in proportion.
        kind: of the second step.
        symbol: how the paper writes the layer.

    Raises:
        ValueError: the layer is out of range.
    """
    need, exact = received(geometry.feature_layer), method.compat is None
    if method.inner_ratio == 1:
        return (Merge(Boundary(), partial(outer, need), (need,), on=VIDEO, counted=exact),)
    layer = method.layer if method.layer is not None else scaled_layers((published,), geometry.llm_layers, 28)[0]
    check_llm_layer(method.name, layer, geometry, 1, symbol)
    row, multiple = attention(layer - 1), 1 / method.inner_ratio if exact else None
    return (
        Merge(Boundary(), partial(outer, need), (need,), on=VIDEO, multiple=multiple, counted=exact),
        kind(Layer(layer), partial(inner, row), (row,), on=VIDEO, counted=exact),
    )


def merged_selection(frames: Frames, keep: Tensor, tokens: Tensor, pivot: Tensor, order: Tensor | None = None) -> Selection:
    """Returns what a step that merges tokens of videos answers.

    Args:
        frames: what the step saw.
        keep: `(G, T, P)` bool.
        tokens: `(G, T, P, D)`, of which kept ones count.
        pivot: `(G, T, P)` int64 into the `T P` tokens: the kept one that a token was merged into, -1 for none; of kept ones it does not matter.
        order: `(G, T P)` int64, all tokens, the kept ones in front and as they are to follow each other; None = by position.
    """
    assign = merged_assign(frames, keep, pivot)
    if order is None:
        return Selection(keep=frames.flat(keep), tokens=frames.flat(tokens), assign=assign)
    first, made = keep.flatten(1).gather(1, order), take(tokens.flatten(1, 2), order)
    return Selection(index=frames.spot.flatten(1).gather(1, order), real=first, tokens=made, assign=assign, order="given")


def merged_assign(frames: Frames, keep: Tensor, pivot: Tensor) -> Tensor:
    """Returns `assign (G, N)` of a Selection: the token of the View that each was merged into; arguments as for `merged_selection`."""
    spot = frames.spot.flatten(1)
    itself = torch.arange(spot.shape[1], device=spot.device).view(pivot.shape[1:])
    pivot = torch.where(keep, itself, pivot).flatten(1)
    assign = torch.where(pivot >= 0, spot.gather(1, pivot.clamp_min(0)), -1)
    return torch.where(frames.flat(frames.real), frames.flat(assign.view(keep.shape)), -1)


def order_by(keep: Tensor, *keys: Tensor) -> Tensor:
    """Returns the order `(G, n)` int64 of the tokens `keep (G, n)` by `keys (G, n)`, the first one first, then by place; others come behind."""
    order = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)
    for key in (*reversed(keys), ~keep):
        order = order.gather(1, key.gather(1, order).to(torch.float64).argsort(dim=1, stable=True))
    return order
