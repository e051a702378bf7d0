"""One model on one task: its rows with names that tell them apart, their budgets, and whom each is compared with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from vtr.eval.report.resamples import Resamples
from vtr.eval.report.speed import Speed
from vtr.eval.run.results import content_hash
from vtr.eval.summary import Condensed, Row, make_rows
from vtr.registry import list_methods, method_class
from vtr.types import BUDGETS
from vtr.types.naming import FULL
from vtr.types.settings import default_settings

AT_A_BUDGET = ("random", "uniform", "pool", "resize")
BASELINES = (FULL, *AT_A_BUDGET, "none")
"""Rows without which a comparison means little."""

CONTEXT = ("dtype", "attention", "device", "max_new_tokens")
PIXELS = ("min_pixels", "max_pixels", "visuals", "scorer")
"""What was asked of the processor, how a model without videos was shown them, and who scored frames; not there where that was left alone."""


class BudgetKey(NamedTuple):
    """Rows with one key are compared: `keep` and `average_keep` of one number, or one ratio. Sorts from the largest budget to the smallest."""

    is_ratio: bool
    negative: float


class Measure(NamedTuple):
    """A measured number of a report: its name in results, the words for it, and what the stored unit is multiplied by."""

    name: str
    words: str
    scale: float = 1.0


class Section:
    """All rows of one model on one task.

    Args:
        cells: of that model and task.
        times: of the same experiments where they were timed; their milliseconds are shown in place of the cells' own.
        speed: records of `vtr bench`; those of the model are kept.
        unique: False where the model's name stands for other weights elsewhere in the report, so that the title needs its hash.
    """

    def __init__(
        self, cells: Sequence[Condensed], times: Sequence[Condensed] = (), speed: Sequence[Speed] = (), unique: bool = True
    ) -> None:
        ordered = sorted(cells, key=lambda cell: (str(cell.fingerprint["method"]), cell.key))
        self.rows = make_rows(ordered)
        first = self.rows[0].fingerprint
        self.model, self.task = str(first["model"]["name"]), str(first["task"]["name"])
        self.name = self.model if unique else f"{self.model} {content_hash(first['model'])[:8]}"
        self.version = str(first["task"].get("version", ""))
        self.title = f"{self.name} on {self.task} {self.version}".strip()
        self._times = {_experiment(row): row.means for row in make_rows(times)}
        self.speed = [one for one in speed if self.model in one.models]
        self.swept = settings_swept(self.rows)
        self.labels = self._name_rows()

    @cached_property
    def reference(self) -> dict[str, tuple[str, ...]]:
        """The samples that most rows have; of `full` where that is a tie."""
        sets = Counter(tuple(sorted(row.samples.items())) for row in self.rows)
        full = [tuple(sorted(row.samples.items())) for row in self.rows if row.method == FULL]
        most = max(sets, key=lambda samples: (sets[samples], samples in full))
        return next(row.samples for row in self.rows if tuple(sorted(row.samples.items())) == most)

    @cached_property
    def comparable(self) -> list[Row]:
        """Rows with the reference samples; only these are averaged, compared, ranked and drawn."""
        return [row for row in self.rows if row.samples == self.reference]

    @cached_property
    def resamples(self) -> Resamples:
        """Of the comparable rows."""
        return Resamples(self.comparable, self.task)

    @cached_property
    def budgets(self) -> dict[BudgetKey, list[Row]]:
        """Rows at each budget, from the largest."""
        found: dict[BudgetKey, list[Row]] = {}
        for row in self.rows:
            if (key := budget_key(row)) is not None:
                found.setdefault(key, []).append(row)
        return dict(sorted(found.items()))

    @cached_property
    def free(self) -> list[Row]:
        """Rows without a budget."""
        return [row for row in self.rows if budget_key(row) is None]

    def shown(self, row: Row) -> str:
        """Returns the label with the number of seeds, for tables."""
        return self.labels[row] + (f" ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else "")

    def full(self, row: Row) -> Row | None:
        """Returns the row `full` that `row` is compared with."""
        return self._partner(row, [other for other in self.free if other.method == FULL])

    def random(self, row: Row) -> Row | None:
        """Returns the row `random` at the budget of `row`."""
        return self.partner(row, "random")

    def partner(self, row: Row, method: str) -> Row | None:
        """Returns the row of another method at the budget of `row` that it is compared with; None where there is none on the same samples."""
        key = budget_key(row)
        others = [other for other in self.budgets[key] if other.method == method] if key is not None else []
        return self._partner(row, others)

    def measured(self, row: Row) -> dict[str, float]:
        """Means of what was measured, times from the timed runs where there are some."""
        times = self._times.get(_experiment(row), {})
        return {**row.means, **{name: value for name, value in times.items() if is_timing(name)}}

    def _partner(self, row: Row, others: Sequence[Row]) -> Row | None:
        """Returns, of rows with the same samples, the one whose budget, settings and conditions are most alike."""
        if row.samples != self.reference:
            return None
        fit = [other for other in others if other.samples == self.reference]
        alike = [
            (o.budget == row.budget, sum(_context(o)[k] == _context(row)[k] for k in (*CONTEXT, *PIXELS)), not o.changed_settings())
            for o in fit
        ]
        return fit[alike.index(max(alike))] if fit else None

    @cached_property
    def names(self) -> dict[Row, str]:
        """Labels that do not depend on what else is in the table: without remarks and settings at their default."""
        return self._name_rows(alone=True)

    def _name_rows(self, alone: bool = False) -> dict[Row, str]:
        contexts = {row: _context(row) for row in self.rows}
        values = {name: {str(context[name]) for context in contexts.values()} for name in next(iter(contexts.values()))}
        values["scorer"] -= {"None"}  # of rows that read no scores of frames
        varying = [name for name, found in values.items() if len(found) > 1]
        renumbering = {row: row.fingerprint["settings"].get("position_ids") for row in self.rows if row.method not in (FULL, "none")}
        positions = set(renumbering.values()) - {None}
        mixed = any(len({row.budget.split()[0] for row in rows}) > 1 for rows in self.budgets.values())
        found: dict[Row, str] = {}
        for row in self.rows:
            told = settings_text(row, () if alone else self.swept[row.method])
            unsaid = not alone and len(positions) > 1 and renumbering.get(row) == "renumber" and "position_ids=renumber" not in told
            words = [row.method, *([] if alone else remarks(row)), *["(renumbered)"] * unsaid, *told]
            if mixed and row.budget.startswith("average_keep"):
                words.append("by average_keep")
            words += [f"{name} {contexts[row][name]}" for name in varying if contexts[row][name] is not None or name not in PIXELS]
            found[row] = " ".join(words)
        same = Counter((label, budget_key(row)) for row, label in found.items())
        return {row: f"{label} #{row.key[:6]}" if same[label, budget_key(row)] > 1 else label for row, label in found.items()}


def settings_swept(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns method -> its settings beside the budget that have several values in these rows; those of plans are not looked at."""
    found: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        own = found.setdefault(row.method, {})
        for name, value in row.fingerprint["settings"].items():
            if name not in BUDGETS and name != "plan":
                own.setdefault(name, set()).add(json.dumps(value))
    return {method: [name for name, values in own.items() if len(values) > 1] for method, own in found.items()}


def budget_key(row: Row) -> BudgetKey | None:
    """Returns the kind and size of a row's budget, None for a row without one."""
    settings = row.fingerprint["settings"]
    return next((BudgetKey(name == "keep_ratio", -float(settings[name])) for name in BUDGETS if settings.get(name) is not None), None)


def budget_title(rows: Sequence[Row]) -> str:
    """Returns `keep 64`, or `keep or average_keep 64` where both stand in one table."""
    kinds = sorted({row.budget.split()[0] for row in rows}, key=BUDGETS.index)
    return f"{' or '.join(kinds)} {float(rows[0].budget.split()[-1]):g}"


def is_timing(name: str) -> bool:
    """Tells whether a number changes from run to run: milliseconds, seconds and memory."""
    return name.endswith(("_ms", "_seconds")) or name.startswith("peak_")


def remarks(row: Row) -> list[str]:
    """Returns what a reader must know about a method wherever it appears."""
    if row.method not in list_methods():
        return []
    card = method_class(row.method).card
    return ["(experimental)"] * card.experimental + ["(ours)"] * (card.ours and row.method not in BASELINES)


def settings_text(row: Row, always: Sequence[str] = ()) -> list[str]:
    """Returns words such as `layer=3` for every setting that is not the method's default, or is always told; the members of a plan with theirs."""
    found, changed = [], row.changed_settings()
    for name, value in row.fingerprint["settings"].items():
        if name not in changed and name not in always:
            continue
        if name == "plan" and isinstance(value, list):
            found.append("[" + "; ".join(_member(one) for one in value) + "]")
        else:
            found.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return found


def _member(settings: Mapping[str, Any]) -> str:
    """Returns a method of a plan in words: `divprune keep=128`."""
    name = str(settings.get("method"))
    known = default_settings(method_class(name)) if name in list_methods() else {}
    own = {k: v for k, v in settings.items() if k in BUDGETS or (k not in ("method", "seed") and v != known.get(k))}
    return " ".join([name, *(f"{k}={v}" for k, v in own.items() if v is not None)])


def _context(row: Row) -> dict[str, Any]:
    """Returns what should be equal in a whole table."""
    versions = row.fingerprint.get("versions") or {}
    named = {name: versions.get(name) for name in ("torch", "transformers")}
    named["scorer"] = (row.fingerprint.get("frame_scores") or {}).get("name")
    return {**{name: row.fingerprint.get(name) for name in (*CONTEXT, *PIXELS)}, "limit": row.fingerprint["task"].get("limit"), **named}


def _experiment(row: Row) -> str:
    """Names an experiment whatever its number of samples, seeds and code."""
    task = {k: v for k, v in row.fingerprint["task"].items() if k != "limit"}
    return content_hash({**row.fingerprint, "seed": None, "code": None, "task": task})
