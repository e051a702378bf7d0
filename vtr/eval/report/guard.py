"""What no method should be used without knowing: where it is no better than `random` or `pool` at its budget."""

from __future__ import annotations

from collections.abc import Iterator

from vtr.eval.report.differences import TOO_FEW
from vtr.eval.report.section import BASELINES, Section, budget_title
from vtr.eval.summary import Row

REFERENCES = ("random", "pool")
"""What costs nothing to choose: a method that does not beat both has found nothing out about the image."""


def references(section: Section, row: Row) -> list[Row]:
    """Returns the rows of `REFERENCES` that a row is compared with: at its budget, on the same samples, set alike."""
    found = [section.partner(row, name) for name in REFERENCES]
    return [other for other in found if other is not None]


def no_better(section: Section, row: Row) -> list[str] | None:
    """Returns the families on which a row is not better than `random` or `pool`, by the paired 95 % interval of the difference.

    Args:
        section: what was measured.
        row: one of its rows.

    Returns:
        Names of families in their order; None where there is nothing to compare with: a baseline itself, no such row at this budget, other samples.
    """
    others = references(section, row)
    if row.method in BASELINES or not others:
        return None
    families = [family for family, ids in section.reference.items() if len(ids) >= TOO_FEW]
    return [family for family in families if any(section.resamples.difference(row, other, family).low <= 0 for other in others)]


def guard(section: Section) -> Iterator[str]:
    """Yields one line for each budget: the methods that are no better than `random` or `pool`, by family."""
    for rows in section.budgets.values():
        judged = {row: own for row in rows if (own := no_better(section, row)) is not None}
        if not judged:
            continue
        names = [name for name in REFERENCES if any(other.method == name for row in judged for other in references(section, row))]
        found = {family: [section.labels[row] for row, own in judged.items() if family in own] for family in section.reference}
        everybody = [section.labels[row] for row in judged]
        said = [f"{family}: {_words(own, everybody)}" for family, own in found.items() if own]
        if said:
            yield f"{section.title}, {budget_title(rows)}: not better than {' and '.join(names)} by the paired interval: {'; '.join(said)}"


def _words(names: list[str], everybody: list[str]) -> str:
    """Returns names, or whom they leave out where that is shorter."""
    others = [name for name in everybody if name not in names]
    if not others:
        return f"all {len(names)}" if len(names) > 1 else names[0]
    return ", ".join(sorted(names)) if len(names) <= len(others) else f"all of {len(everybody)} but {', '.join(sorted(others))}"
