"""Comparisons of rows over the same samples, all from one set of resampled means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vtr.eval.stats import Interval, interval, resampled_means
from vtr.eval.summary import Row


class Resamples:
    """Resampled accuracies of rows that have the same samples.

    Args:
        rows: with equal `Row.samples`.
        task: its name; other tasks are resampled independently.
    """

    def __init__(self, rows: Sequence[Row], task: str) -> None:
        self._column = {row: index for index, row in enumerate(rows)}
        keys = [row.key for row in rows]
        self._families = {
            family: resampled_means([row.groups[family].values for row in rows], f"{task}/{family}", keys).astype(np.float32)
            for family in rows[0].groups
        }
        self._macro: np.ndarray = np.mean(list(self._families.values()), axis=0)

    def __contains__(self, row: Row | None) -> bool:
        return row in self._column

    def difference(self, row: Row, other: Row, family: str | None = None) -> Interval:
        """Returns the accuracy of `row` minus that of `other`: of one family, macro without."""
        first, second = (one.macro if family is None else one.families[family] for one in (row, other))
        return interval(first.value - second.value, self._of(row, family) - self._of(other, family))

    def relative(self, row: Row, full: Row) -> Interval | None:
        """Returns the macro accuracy of `row` over that of `full`; None where `full` has none right."""
        shares = self.relative_shares(row, full)
        return None if shares is None else interval(row.macro.value / full.macro.value, shares)

    def relative_shares(self, row: Row, full: Row) -> np.ndarray | None:
        """Returns the resampled values behind `relative`, `(RESAMPLES,)`."""
        base = self._of(full)
        return None if full.macro.value == 0 or (base == 0).any() else self._of(row) / base

    def ranks(self, rows: Sequence[Row], family: str | None = None) -> list[Interval]:
        """Returns the rank of each row among these by one family, by macro accuracy without; 1 is best, equal rows share the better rank.

        O(RESAMPLES x rows^2).
        """
        means = self._table(family)[:, [self._column[row] for row in rows]]
        values = np.asarray([(row.macro if family is None else row.families[family]).value for row in rows])
        found = []
        for index, value in enumerate(values):
            resampled = 1 + (means > means[:, index : index + 1] + 1e-6).sum(1)
            low, high = np.quantile(resampled, (0.025, 0.975), method="closest_observation")
            rank = float(1 + (values > value + 1e-6).sum())
            found.append(Interval(rank, min(rank, float(low)), max(rank, float(high))))
        return found

    def _of(self, row: Row, family: str | None = None) -> np.ndarray:
        return self._table(family)[:, self._column[row]]

    def _table(self, family: str | None) -> np.ndarray:
        return self._macro if family is None else self._families[family]
