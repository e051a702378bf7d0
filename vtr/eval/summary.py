"""From result files to rows of a table: seeds of one experiment together, with intervals over samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtr.eval.cells import FULL
from vtr.eval.results import content_hash
from vtr.eval.stats import Interval, accuracy, macro_accuracy
from vtr.registry import default_settings, method_class

BUDGETS = ("keep", "keep_ratio", "average_keep")


@dataclass(frozen=True)
class Row:
    """One experiment over all its seeds.

    Args:
        fingerprint: of its first cell; the seed there is one of `seeds`.
        seeds: empty for a method without random choices.
        outcomes: family -> sample id -> mean outcome over seeds, 0 to 1.
        families: family -> accuracy with its 95 % interval.
        macro: unweighted mean over families.
        means: means over seeds of the numbers in the cells' summaries.
    """

    fingerprint: Mapping[str, Any]
    seeds: tuple[int, ...]
    outcomes: Mapping[str, Mapping[str, float]]
    families: Mapping[str, Interval]
    macro: Interval
    means: Mapping[str, float]

    @property
    def method(self) -> str:
        """Name of the method, `full` without one."""
        return str(self.fingerprint["method"])

    @property
    def budget(self) -> str:
        """`keep 64`, or nothing for a method without budget."""
        settings = self.fingerprint["settings"]
        return next((f"{name} {settings[name]}" for name in BUDGETS if settings.get(name) is not None), "")

    @property
    def keep(self) -> int | None:
        """The keep count asked for."""
        return self.fingerprint["settings"].get("keep")

    def changed_settings(self) -> dict[str, Any]:
        """Settings beside the budget that differ from the method's defaults."""
        if self.method == FULL:
            return {}
        defaults = default_settings(method_class(self.method))
        given = self.fingerprint["settings"]
        return {k: v for k, v in given.items() if k not in BUDGETS and _plain(v) != _plain(defaults.get(k))}


def _plain(value: Any) -> Any:
    """As JSON has it: tuples are lists there."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def make_rows(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows in the order in which their experiments first appear.

    Args:
        cells: contents of result files of one task.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(content_hash({**cell["fingerprint"], "seed": None}), []).append(cell)
    return [_row(group) for group in groups.values()]


def _row(cells: Sequence[Mapping[str, Any]]) -> Row:
    sums: dict[str, dict[str, float]] = {}
    for cell in cells:
        for sample in cell["samples"]:
            family = sums.setdefault(sample["family"], {})
            family[sample["id"]] = family.get(sample["id"], 0.0) + float(sample["correct"])
    outcomes = {family: {i: total / len(cells) for i, total in samples.items()} for family, samples in sums.items()}
    numbers = [name for name, value in cells[0]["summary"].items() if isinstance(value, (int, float))]
    seeds = sorted(cell["fingerprint"]["seed"] for cell in cells if cell["fingerprint"]["seed"] is not None)
    return Row(
        fingerprint=cells[0]["fingerprint"],
        seeds=tuple(seeds),
        outcomes=outcomes,
        families={family: accuracy(list(samples.values())) for family, samples in outcomes.items()},
        macro=macro_accuracy({family: list(samples.values()) for family, samples in outcomes.items()}),
        means={name: sum(cell["summary"][name] for cell in cells) / len(cells) for name in numbers},
    )


def percent(interval: Interval) -> str:
    """`94.2 (91.8-95.9)`, in percent."""
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f}-{100 * interval.high:.1f})"
