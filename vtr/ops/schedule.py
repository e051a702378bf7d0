"""Removal schedules over the layers of an LLM: published ones carried over to other depths, and what an average can reach with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def nearest_table(
    tables: Mapping[int, Sequence[int]],
    layers: Sequence[int],
    depth: int,
    *,
    keep: float | None = None,
    average: float | None = None,
    n: int,
) -> int:
    """Name of the published table whose budget is nearest to what is wanted.

    Args:
        tables: nominal average -> counts after each removal, of an image of `n` tokens.
        layers: where the removals are in an LLM of `depth` layers.
        keep: wanted share of the tokens after the last removal; or
        average: wanted mean share over the layers, of which only tables within reach are taken (if there is none, the one reaching lowest).
        n: tokens the tables were made for.
    """
    if average is None:
        assert keep is not None
        return min(tables, key=lambda name: abs(math.log(tables[name][-1] / n / keep)))
    least = {name: least_average(layers, shares_of(counts, n), depth) for name, counts in tables.items()}
    reach = [name for name in tables if least[name] <= 0.95 * average] or [min(least, key=least.__getitem__)]
    return min(reach, key=lambda name: abs(math.log(name / n / average)))


def table_schedule(
    who: str,
    tables: Mapping[int, Sequence[int]],
    published: Sequence[int],
    *,
    layers: tuple[int, ...] | None,
    counts: tuple[int, ...] | None,
    table: int | None,
    depth: int,
    most: int,
    keep: float | None,
    average: float | None,
    n: int = 576,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Layers and shares of a method with published tables.

    Args:
        who: the method, for messages.
        tables: nominal average -> counts after each removal, of an image of `n` tokens.
        published: layers of the tables in an LLM of 32 layers.
        layers, counts, table: what the user gave, checked.
        depth, most: layers of the LLM, and the most tokens of an image.
        keep, average: wanted share of the tokens, one of them.

    Raises:
        ValueError: the LLM has too few layers.
    """
    try:
        layers = layers or scaled_layers(published, depth)
    except ValueError as error:
        raise ValueError(f"{who}: {error}; use 'fastv', which removes once") from error
    if counts is not None:
        return layers, shares_of(counts, most)
    name = table if table is not None else nearest_table(tables, layers, depth, keep=keep, average=average, n=n)
    return layers, shares_of(tables[name], n)
