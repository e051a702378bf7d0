"""What pages say of methods in words: read from `eval/measured/embedded.csv` and from the tables of docs/results.md, so that it cannot rot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from vtr.eval.measured import FILE, Measured, read_measured
from vtr.registry import list_methods, method_class
from vtr.types.settings import default_settings

FAMILIES = ("existence", "attribute", "counting", "relation", "text", "order", "motion", "events", "needle")
REFERENCES = ("random", "pool", "uniform", "resize", "frames", "none", "full")
_SCORE = re.compile(r"^(-?[\d.]+) \((-?[\d.]+)-(-?[\d.]+)\)")


@dataclass(frozen=True)
class Score:
    """Percent with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Facts:
    """The measured lines, and the scores of families beside them.

    Args:
        lines: of `embedded.csv`.
        scores: `(on, budget, label)` -> family -> score, from docs/results.md.
        tables: `(on, title of a table)` -> label -> column -> cell, of all its tables.
    """

    lines: list[Measured]
    scores: Mapping[tuple[str, str, str], Mapping[str, Score]]
    tables: Mapping[tuple[str, str], Mapping[str, Mapping[str, str]]]
    _budgets: dict[str, str] = field(default_factory=dict, init=False)

    @classmethod
    def read(cls, root: Path) -> Self:
        """Reads both files of a clone."""
        tables = read_tables((root / "docs" / "results.md").read_text(encoding="utf-8"))
        scores = {}
        for (on, title), rows in tables.items():
            for label, cells in rows.items():
                found = {name: Score(*map(float, match.groups())) for name, cell in cells.items() if (match := _SCORE.match(cell))}
                if set(found) & set(FAMILIES) and ":" not in title:
                    scores[on, title, label] = found
        return cls(read_measured(root / "eval" / "measured" / FILE), scores, tables)

    @property
    def models(self) -> list[str]:
        """What was measured, `tiny-llava on shapes v1`, images first."""
        return sorted({one.on for one in self.lines}, key=lambda on: ("video" in on, on))

    def tokens(self, on: str) -> float:
        """Returns the visual tokens of an image, or a video, of the full model."""
        return next(float(one.tokens) for one in self.lines if one.on == on and one.label == "full")

    def quarter(self, on: str) -> str:
        """Returns the measured budget whose share of the tokens is nearest to a quarter: `keep 128`."""
        if on not in self._budgets:
            self._budgets[on] = min(self.budgets(on), key=lambda budget: abs(int(budget.split()[1]) / self.tokens(on) - 0.25))
        return self._budgets[on]

    def budgets(self, on: str) -> list[str]:
        """Returns the budgets that a model was measured at, the smallest first."""
        found = {one.budget for one in self.lines if one.on == on and one.budget.startswith("keep ")}
        return sorted(found, key=lambda budget: int(budget.split()[1]))

    def fewest(self, on: str) -> str:
        """Returns the smallest of them."""
        return self.budgets(on)[0]

    def at(self, on: str, budget: str) -> list[Measured]:
        """Returns the lines of a model at a budget, the best first."""
        return sorted((one for one in self.lines if (one.on, one.budget) == (on, budget)), key=lambda one: (-float(one.macro), one.label))

    def families(self, on: str) -> list[str]:
        """Returns the families of questions that a model was asked, in their order."""
        found = {family for (where, _, _), row in self.scores.items() if where == on for family in row}
        return [family for family in FAMILIES if family in found]

    def score(self, one: Measured, family: str, label: str | None = None) -> Score | None:
        """Returns the score of a line on a family, or that of another row at its budget; None where there is none."""
        return self.scores.get((one.on, one.budget, label or one.label), {}).get(family)

    def better(self, one: Measured, family: str) -> bool:
        """Tells whether a line beats `random` and `pool` on a family.

        By the paired interval where the results were compared, else only if its own interval lies above both of theirs.
        """
        own = self.score(one, family)
        others = [self.score(one, family, name) for name in ("random", "pool")]
        if own is None or one.method in REFERENCES or None in others:
            return False
        if one.no_better != "-":
            return family not in one.no_better.split(",")
        return all(own.low > other.high for other in others if other is not None)

    def better_overall(self, one: Measured) -> bool:
        """Tells whether the interval of a line's macro accuracy lies above the scores of `random` and `pool`."""
        return one.method not in REFERENCES and bool(one.random and one.pool) and float(one.low) > max(float(one.random), float(one.pool))

    def worse(self, one: Measured, family: str) -> bool:
        """Tells whether the interval of a line lies below that of `random`."""
        own, other = self.score(one, family), self.score(one, family, "random")
        return own is not None and other is not None and own.high < other.low

    def later(self, one: Measured) -> bool:
        """Tells whether the layers have more tokens on average than are left in the end, so that a budget means less work saved."""
        return bool(one.average) and float(one.average) > 1.1 * float(one.tokens)


def read_tables(page: str) -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """Returns the tables below headings `### TITLE` of `## MODEL on TASK`; a row that comes again, of a later sweep, stays as it was first."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    on = title = ""
    head: list[str] = []
    for line in page.splitlines():
        if line.startswith("#"):
            on, title, head = (line[3:], "", []) if line.startswith("## ") else (on, line.lstrip("# "), [])
        elif line.startswith("|") and title:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not head:
                head = cells
            elif not set(line) <= set("|-"):
                label = unadorned(cells[0])
                found.setdefault((on, title), {}).setdefault(label, dict(zip(head[1:], cells[1:], strict=True)))
        else:
            head = head if line.startswith("|") else []
    return found


def unadorned(label: str) -> str:
    """Returns the label of a row as `embedded.csv` has it, without remarks and settings at their default: `pool frames=each` -> `pool`."""
    name, *words = re.sub(r" \([^)]*\)", "", label).split(" ")
    known = default_settings(method_class(name)) if name in list_methods() else {}
    unchanged = {f"{setting}={value}" for setting, value in known.items()}
    return " ".join([name, *(word for word in words if word not in unchanged)])


def short(on: str) -> str:
    """`tiny-llava on shapes v1` -> `tiny-llava`."""
    return on.split(" on ")[0]


def listed(words: Iterable[str]) -> str:
    """Joins words: `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
