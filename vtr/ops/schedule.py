"""Removal schedules over the layers of an LLM: published ones carried over to other depths, and what an average can reach with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def scaled_layers(layers: Sequence[int], depth: int, published: int = 32) -> tuple[int, ...]:
    """Layers of a schedule published for an LLM of `published` layers at the same relative depth of one of `depth`.

    Rounded half to even, strictly ascending, all in 1 .. depth - 1; equal to `layers` when the depths agree.

    Raises:
        ValueError: the LLM has too few layers for that many removals.
    """
    if len(layers) >= depth:
        raise ValueError(f"a schedule of {len(layers)} removals needs an LLM of at least {len(layers) + 1} layers, this one has {depth}")
    placed: list[int] = []
    for layer in layers:
        placed.append(max(round(layer * depth / published), 1, placed[-1] + 1 if placed else 1))
    return tuple(min(layer, depth - len(layers) + i) for i, layer in enumerate(placed))


def shares_of(counts: Sequence[float], n: float) -> tuple[float, ...]:
    """Share of the way from the last count (0) to `n` (1) at which each count is: what `Step.share` takes."""
    last = counts[-1]
    return tuple((count - last) / (n - last) if n > last else 0.0 for count in counts)


def least_average(layers: Sequence[int], shares: Sequence[float], depth: int) -> float:
    """Mean over the layers of the share of visual tokens, when next to nothing is left after the last removal."""
    parts = zip((0, *layers), (*layers, depth), (1.0, *shares), strict=True)
    return sum((stop - start) * share for start, stop, share in parts) / depth


def checked_layers(who: str, layers: object, removals: int | None = None) -> tuple[int, ...] | None:
    """`layers` of a schedule as a tuple: ascending integers from 1; None stays None.

    Raises:
        TypeError: not a list of integers.
        ValueError: not ascending from 1, or another number of them than `removals`.
    """
    if layers is None:
        return None
    if not isinstance(layers, (list, tuple)) or any(isinstance(v, bool) or not isinstance(v, int) for v in layers):
        raise TypeError(f"{who}: layers must be a list of layer numbers, got {layers!r}")
    if not layers or layers[0] < 1 or any(a >= b for a, b in pairwise(layers)):
        raise ValueError(
            f"{who}: layers must be ascending and at least 1, got {list(layers)} (0-based, gone from the input of that layer; a paper that "
            "prunes 'after layer l' and counts from 0 calls it l = layer - 1)"
        )
    if removals is not None and len(layers) != removals:
        raise ValueError(f"{who}: layers must name {removals} layers, one per removal, got {list(layers)}")
    return tuple(layers)


def checked_counts(who: str, counts: object, removals: int) -> tuple[int, ...] | None:
    """`counts` of a schedule as a tuple: one descending keep count per removal; None stays None.

    Raises:
        TypeError: not a list of integers.
        ValueError: below 1, ascending, or another number of them than `removals`.
    """
    if counts is None:
        return None
    if not isinstance(counts, (list, tuple)) or any(isinstance(v, bool) or not isinstance(v, int) for v in counts):
        raise TypeError(f"{who}: counts must be a list of keep counts, got {counts!r}")
    if len(counts) != removals or counts[-1] < 1 or any(a < b for a, b in pairwise(counts)):
        raise ValueError(f"{who}: counts must be {removals} keep counts in descending order, at least 1, got {list(counts)}")
    return tuple(counts)
