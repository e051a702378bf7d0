"""What became of one token, in words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from vtr.ui.session import Column
from vtr.ui.steps import Taken, hindrance, left_after

DOES = {
    "remove": "removes tokens",
    "merge": "merges tokens",
    "observe": "only reads",
    "freeze": "does not compute visual tokens in this layer",
    "restore": "gives all tokens back",
    "input": "makes the picture smaller",
    "attend": "chooses what new tokens attend to",
}


@dataclass(frozen=True)
class Explanation:
    """What became of a token.

    Args:
        token: patch id.
        kept: it is left in the end.
        step: number of the step that removed it, None where none did.
        target: the token that it was merged into, at the end; None where it was not merged, or that one was removed later.
        rank: at the last step that ranked it, None where nothing did.
        lines: sentences.
        fixed: why it cannot be put back; empty where it can.
    """

    token: int
    kept: bool
    step: int | None
    target: int | None
    rank: int | None
    lines: list[str]
    fixed: str


def explain(column: Column, token: int) -> Explanation:
    """Returns what a method did with a token, step by step."""
    entry, name = column.entry, column.method.name
    where = f"**Token {token}** is {place_of(entry, token)}."
    if token not in set(entry["tokens"]):
        return Explanation(
            token, False, None, None, None, [where, "It never was a visual token: the model cuts this patch off as padding."], "It is none."
        )
    if column.resized:
        why = "The picture was made smaller in front of the vision tower, so every token that is left covers more of it; none is missing."
        return Explanation(token, token in set(entry["retained"]), None, None, None, [where, why], why)
    kept, into = left_after(entry["tokens"], column.taken)
    lines, gone, rank = [where], None, None
    for number, step in enumerate(column.taken):
        if token not in step.seen or step.action == "observe":
            continue
        rank = (step.ranks or {}).get(token, rank)
        lines.append(f"{_at(step)}: {_fate(step, entry, token)}")
        if token in step.gone:
            gone = number
            break
    back = gone is not None and token in kept  # a restoring step came later
    if back:
        lines.append("A later step of the method gives it back.")
    elif gone is None:
        lines.append("It is kept to the end.")
        sources = sum(pivot == token for pivot in into.values())
        if sources:
            lines.append(f"It stands for {sources + 1} tokens: {sources} were merged into it.")
    elif token in into and into[token] != (column.taken[gone].pivots or {}).get(token):
        lines.append(f"That one was merged again; at the end it is in {place_of(entry, into[token])}.")
    elif (column.taken[gone].pivots or {}).get(token) is not None and token not in into:
        lines.append("That one was removed later.")
    if not any(step.ranks for step in column.taken):
        lines.append(f"`{name}` does not rank tokens one by one: it chooses from {column.method.card.signals}.")
    fixed = ""
    if gone is None or back:
        fixed = "It is not gone."
    elif (hindering := hindrance(column.taken, token)) is not None:
        fixed = f"It cannot be put back: {hindering.fixed}."
    return Explanation(token, token in kept, gone, into.get(token), rank, lines, fixed)


def place_of(entry: Mapping[str, Any], token: int) -> str:
    """Returns where a patch is, counted from 1 in words: `row 3, column 5`, with its view or frame where there are several."""
    grids, ends = _grids(entry), _ends(entry)
    view = bisect_right(ends, token)
    row, col = divmod(token - (ends[view - 1] if view else 0), grids[view][1])
    several = f"{'frame' if entry.get('kind') == 'video' else 'view'} {view + 1}, " if len(grids) > 1 else ""
    return f"{several}row {row + 1}, column {col + 1}"


def is_patch(entry: Mapping[str, Any], token: float | None) -> bool:
    """Returns whether a number is that of a patch."""
    return token is not None and 0 <= token < _ends(entry)[-1]


def _grids(entry: Mapping[str, Any]) -> list[list[int]]:
    return entry.get("grids") or [entry["patch_grid"]] * entry["views"]


def _ends(entry: Mapping[str, Any]) -> list[int]:
    """Returns the first number behind the patches of every view."""
    return list(accumulate(rows * cols for rows, cols in _grids(entry)))


def step_labels(column: Column) -> list[str]:
    """Returns the steps of a plan as one can choose among them: before any, then behind each."""
    labels, kept = ["before any step"], len(column.entry["tokens"])
    for number, step in enumerate(column.taken):
        if step.action == "input":
            kept = len(column.entry["retained"])
        else:
            kept = len(left_after(column.entry["tokens"], column.taken[: number + 1])[0])
        labels.append(f"{number + 1}. {step.place}: {DOES[step.action]}, {kept} left")
    return labels


def _at(step: Taken) -> str:
    return f"At {'the ' if step.place.startswith('boundary') else ''}{step.place}"


def _fate(step: Taken, entry: Mapping[str, Any], token: int) -> str:
    rank = (step.ranks or {}).get(token)
    how = "" if rank is None else f"rank {rank} of {_compared(step)}, of which {_left(step)} stay; "
    if token not in step.gone:
        return f"{how}it stays."
    pivot = (step.pivots or {}).get(token)
    if pivot is None:
        return f"{how}it is removed."
    return f"{how}it is merged into token {pivot}, {place_of(entry, pivot)}."


def _compared(step: Taken) -> str:
    return str(len(step.seen)) if len(set(step.counts)) == 1 == len(step.counts) else f"its view's or frame's {max(step.counts)}"


def _left(step: Taken) -> str:
    return (
        str(len(step.kept))
        if len(step.keeps) == 1
        else (f"{max(step.keeps)}" if len(set(step.keeps)) == 1 else f"at most {max(step.keeps)}")
    )
