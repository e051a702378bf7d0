"""Names: the model without a reduction, the closest to one that is not known, and the method whose steps are being made."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_METHOD: ContextVar[str] = ContextVar("vtr_method", default="")


@contextmanager
def steps_of_method(name: str) -> Iterator[None]:
    """Lets the messages of steps, places and signals that are made in the block begin with the name of a method."""
    before = _METHOD.set(name)
    try:
        yield
    finally:
        _METHOD.reset(before)


def named(part: object) -> str:
    """Returns what messages about a step, a place or a signal begin with: `fastv: Remove` while the steps of `fastv` are made."""
    method = _METHOD.get()
    return f"{method}: {type(part).__name__}" if method else type(part).__name__


FULL = "full"
"""A row of every table, not a method: the model without any reduction."""


def closest(name: str, known: list[str]) -> str:
    """`; did you mean 'a', 'b' or 'c'?` with the three closest names, or nothing when there are none."""
    near = difflib.get_close_matches(str(name).lower().replace("-", "").replace("_", ""), known, n=3, cutoff=0.0)
    quoted = [f"'{n}'" for n in near]
    listed = quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" or {quoted[-1]}" if quoted else ""
    return f"; did you mean {listed}?" if listed else ""
