"""The name of the model without a reduction, and what is said about a name that is not known."""

from __future__ import annotations

import difflib

FULL = "full"
"""A row of every table, not a method: the model without any reduction."""


def closest(name: str, known: list[str]) -> str:
    """`; did you mean 'a', 'b' or 'c'?` with the three closest names, or nothing when there are none."""
    near = difflib.get_close_matches(str(name).lower().replace("-", "").replace("_", ""), known, n=3, cutoff=0.0)
    quoted = [f"'{n}'" for n in near]
    listed = quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" or {quoted[-1]}" if quoted else ""
    return f"; did you mean {listed}?" if listed else ""
