"""What a report is made of before it becomes Markdown, CSV, LaTeX or HTML: tables of cells, notes and figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtr.eval.stats import Interval


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: as shown; empty = not measured.
        value, low, high: the numbers behind it, in the unit of the column.
        mark: `same` = not distinguishable from random, `missing` = a row that belongs here and was not run.
    """

    text: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table; the first cell of every row is its name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A drawn plot; `name` is fit for a file."""

    name: str
    title: str
    png: bytes = field(repr=False)
    svg: bytes = field(repr=False)


@dataclass
class Part:
    """One model on one task, or on all its tasks."""

    model: str
    title: str
    scope: str
    tables: list[Table]
    figures: list[Figure] = field(default_factory=list)


@dataclass
class Document:
    """A whole report: what to be careful with, the parts, what the columns mean, and which methods are no better than chance."""

    warnings: list[str]
    parts: list[Part]
    legend: list[str]
    guards: list[str] = field(default_factory=list)

    def notices(self) -> list[tuple[str, list[str]]]:
        """Returns what stands in front of the tables: a heading and its lines, without empty ones."""
        return [(head, lines) for head, lines in (("No better than chance", self.guards), ("Warnings", self.warnings)) if lines]


def number(value: float | None, scale: float = 1.0) -> Cell:
    """Returns a measured number to about three digits; None is a blank."""
    if value is None:
        return Cell()
    value *= scale
    size = abs(value)
    text = (
        f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 or value == 0 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"
    )
    return Cell(text, value)


def share(interval: Interval | None) -> Cell:
    """Returns a share with its interval, shown in percent; None is a blank."""
    if interval is None:
        return Cell()
    value, low, high = (100 * end for end in interval)
    return Cell(f"{value:.1f} ({low:.1f}-{high:.1f})", value, low, high)


def points(step: Interval, judge: bool = False) -> Cell:
    """Returns a difference of two shares in points, marked where it may be 0; `judge` puts `better`, `worse` or `not distinguishable` in front."""
    verdict = "better " if step.low > 0 else "worse " if step.high < 0 else "not distinguishable "
    value, low, high = (100 * end for end in step)
    text = f"{verdict if judge else ''}{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return Cell(text, value, low, high, "same" if step.low <= 0 <= step.high else "")
