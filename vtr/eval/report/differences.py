"""Paired differences: of every row against one method at its budget, and of every value of a swept setting against the default."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vtr.eval.report.document import Cell, Table, points, share
from vtr.eval.report.section import Section
from vtr.eval.run.results import content_hash
from vtr.eval.summary import Row
from vtr.registry import list_methods, method_class
from vtr.types.naming import FULL
from vtr.types.settings import default_settings

TOO_FEW = 10
"""Samples of a family below which a bootstrap says nothing: of a single one every resample is the same."""


def compared(section: Section, row: Row, other: Row, family: str | None = None, judge: bool = False) -> Cell:
    """Returns a row minus another one on the same samples, in points of one family, or of the macro score.

    Args:
        section: of both.
        row, other: two of its comparable rows.
        family: None for the macro score.
        judge: put `better`, `worse` or `not distinguishable` in front.
    """
    sizes = [len(ids) for name, ids in row.samples.items() if family in (None, name)]
    if min(sizes) < TOO_FEW:
        return Cell(f"no verdict below {TOO_FEW} samples")
    return points(section.resamples.difference(row, other, family), judge)


def rival(section: Section, row: Row, method: str) -> Row | None:
    """Returns the row of a method that a row is compared with: at its budget, on the same samples, set alike; None where there is no other."""
    other = section.full(row) if method == FULL else section.partner(row, method)
    return None if other is row else other


def against_table(section: Section, title: str, rows: Sequence[Row], method: str) -> Table | None:
    """Returns the differences of rows of one budget to the row of a method there, by family; None where it has none."""
    families: list[str | None] = [*section.reference, None] if len(section.reference) > 1 else [None]
    lines = []
    for row in rows:
        other = rival(section, row, method)
        if other is not None:
            lines.append((Cell(section.shown(row)), *(compared(section, row, other, family) for family in families)))
    columns = ("method", *(family or "macro" for family in families))
    return Table(f"{title}: against {method}", columns, tuple(lines)) if lines else None


def ablation_tables(section: Section, title: str, rows: Sequence[Row]) -> Iterator[Table]:
    """Yields a table for every setting of which a method was run with several values at one budget, all else alike; one table for all methods that
    were run with the same values of it."""
    there = [row for row in rows if row in section.resamples]
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for method in dict.fromkeys(row.method for row in there):
        own, swept = [row for row in there if row.method == method], section.swept[method]
        for name in swept:
            groups: dict[str, list[Row]] = {}
            for row in own:
                settings = {k: v for k, v in row.fingerprint["settings"].items() if k != name}
                groups.setdefault(content_hash({**row.fingerprint, "seed": None, "settings": settings}), []).append(row)
            for alike in groups.values():
                if len(alike) > 1:
                    alike = sorted(alike, key=lambda row: _order(_value(row, name)))
                    rest = "".join(f" {k}={_text(_value(alike[0], k))}" for k in swept if k != name)
                    found.setdefault((name, *(_text(_value(row, name)) for row in alike)), {})[f"{method}{rest}"] = alike
    for (name, *values), by_label in found.items():
        if len({alike[0].method for alike in by_label.values()}) > 1:
            yield _side_by_side(section, f"{title}: by {name}", name, values, by_label)
        else:
            for label, alike in by_label.items():
                yield _ablation(section, f"{title}: {label} by {name}", name, alike)


def _ablation(section: Section, title: str, name: str, rows: Sequence[Row]) -> Table:
    first = next((row for row in rows if _is_default(row, name)), rows[0])
    lines = []
    for row in rows:
        scores = [share(row.families[family]) for family in section.reference] if len(section.reference) > 1 else []
        step = Cell() if row is first else compared(section, row, first)
        lines.append((Cell(f"{_text(_value(row, name))}{_mark(row, name)}"), *scores, share(row.macro), step))
    families = section.reference if len(section.reference) > 1 else ()
    return Table(title, (name, *families, "macro", f"against {name}={_text(_value(first, name))}"), tuple(lines))


def _side_by_side(section: Section, title: str, name: str, values: Sequence[str], by_label: Mapping[str, Sequence[Row]]) -> Table:
    """Macro scores of several methods with the same values of a setting, and what every value changes against the first one."""
    lines = []
    for label, rows in by_label.items():
        scores = [replace(cell := share(row.macro), text=f"{cell.text}{_mark(row, name)}") for row in rows]
        lines.append((Cell(label), *scores, *(compared(section, row, rows[0]) for row in rows[1:])))
    steps = (f"{value} against {values[0]}" for value in values[1:])
    return Table(title, ("method", *(f"{name}={value}" for value in values), *steps), tuple(lines))


def _is_default(row: Row, name: str) -> bool:
    default = default_settings(method_class(row.method)).get(name) if row.method in list_methods() else None
    return _text(_value(row, name)) == _text(default)


def _mark(row: Row, name: str) -> str:
    return " (default)" if _is_default(row, name) else ""


def _value(row: Row, name: str) -> Any:
    return row.fingerprint["settings"].get(name)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, (int, float))
    return (not is_number, float(value) if is_number else 0.0, _text(value))


def lacking(section: Section, method: str) -> list[str]:
    """Returns the budgets at which there are rows, but none of a method to compare them with."""
    found = []
    for rows in section.budgets.values():
        if not any(rival(section, row, method) for row in rows) and any(row.method != method for row in rows):
            found.append(rows[0].budget)
    return found
