"""Mean relative accuracy over several tasks, only of rows that were measured on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vtr.eval.report.document import Cell, Part, Table, share
from vtr.eval.report.section import BudgetKey, Section, budget_key, budget_title
from vtr.eval.stats import Interval, interval
from vtr.eval.summary import Row
from vtr.types.naming import FULL


def average_part(sections: Sequence[Section]) -> tuple[Part, list[str]] | None:
    """Returns the tables over all tasks of one model with a line for every mean that was refused; None where there is one task.

    Args:
        sections: all of one model, one for each task.
    """
    if len(sections) < 2:
        return None
    places: dict[BudgetKey | None, dict[str, dict[int, Row]]] = {}
    for index, section in enumerate(sections):
        for row in section.rows:
            if row.method != FULL:
                places.setdefault(budget_key(row), {}).setdefault(section.labels[row], {})[index] = row
    tables, refused = [], []
    for key in sorted(places, key=lambda k: (k is not None, k or ())):
        table, lines = _table(sections, places[key])
        tables.append(table)
        refused += lines
    scope = f"relative accuracy on each of {len(sections)} tasks and its mean; a row that lacks a task has no mean"
    return Part(sections[0].name, f"{sections[0].name} over all tasks", scope, tables), refused


def _table(sections: Sequence[Section], rows: dict[str, dict[int, Row]]) -> tuple[Table, list[str]]:
    budgeted = [row for own in rows.values() for row in own.values() if row.budget]
    title = budget_title(budgeted) if budgeted else "without a budget"
    lines, refused = [], []
    for label, own in rows.items():
        relative, resampled = {}, []
        for index, row in own.items():
            full = sections[index].full(row)
            shares = sections[index].resamples.relative_shares(row, full) if full else None
            if full and shares is not None:
                relative[index] = interval(row.macro.value / full.macro.value, shares)
                resampled.append(shares)
        lacking = [section.task for index, section in enumerate(sections) if index not in relative]
        mean: Interval | None = None
        if lacking:
            refused.append(f"{sections[0].name}, {title}: no mean for {label}, which has no relative accuracy on {', '.join(lacking)}")
        else:
            mean = interval(float(np.mean([one.value for one in relative.values()])), np.mean(resampled, axis=0))
        lines.append((Cell(label), *(share(relative.get(index)) for index in range(len(sections))), share(mean)))
    lines.sort(key=lambda line: (-(line[-1].value or 0), line[0].text))
    return Table(title, ("method", *(section.task for section in sections), "mean"), tuple(lines)), refused
