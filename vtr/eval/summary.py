"""From result files to rows of a table: seeds of one experiment together, with intervals over samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vtr.eval.run.results import ResultError, content_hash
from vtr.eval.stats import Interval, accuracies, combine
from vtr.registry import list_methods, method_class
from vtr.types import BUDGETS
from vtr.types.settings import default_settings


class Outcomes(NamedTuple):
    """Outcomes of one family: sample ids in order, and `(S, n)` float64 in 0 to 1 of S seeds on n samples."""

    ids: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class Condensed:
    """What tables need of a result file, about a hundredth of its size.

    Args:
        key: of the file; equal keys are the same experiment.
        fingerprint: of the file.
        numbers: the numbers of its summary; milliseconds only where the tower ran in this cell.
        metrics: what the task's own harness made of all samples, by its names and in its units.
        families: family -> outcomes of one seed.
        most_retained: the largest number of visual tokens left of one image.
    """

    key: str
    fingerprint: Mapping[str, Any]
    numbers: Mapping[str, float]
    metrics: Mapping[str, float]
    families: Mapping[str, Outcomes]
    most_retained: int | None


@dataclass(frozen=True, eq=False)
class Row:
    """One experiment over all its seeds.

    Args:
        key: hash of the fingerprint without seed.
        fingerprint: of its first cell; the seed there is one of `seeds`.
        seeds: empty for a method without random choices.
        groups: family -> outcomes of every seed.
        families: family -> accuracy with its 95 % interval.
        macro: unweighted mean over families.
        means, metrics: means over seeds of the numbers that all its cells have.
        most_retained: see `Condensed`.
    """

    key: str
    fingerprint: Mapping[str, Any]
    seeds: tuple[int, ...]
    groups: Mapping[str, Outcomes]
    families: Mapping[str, Interval]
    macro: Interval
    means: Mapping[str, float]
    metrics: Mapping[str, float]
    most_retained: int | None

    @cached_property
    def outcomes(self) -> dict[str, dict[str, float]]:
        """Family -> sample id -> mean outcome over seeds."""
        return {name: dict(zip(group.ids, group.values.mean(0).tolist(), strict=True)) for name, group in self.groups.items()}

    @property
    def samples(self) -> dict[str, tuple[str, ...]]:
        """Family -> ids of its samples."""
        return {name: group.ids for name, group in self.groups.items()}

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
        """The user's keep count, None without one."""
        return self.fingerprint["settings"].get("keep")

    def changed_settings(self) -> dict[str, Any]:
        """Returns the settings beside the budget that differ from the method's defaults; all of them where the method is not known here."""
        given = {k: v for k, v in self.fingerprint["settings"].items() if k not in BUDGETS}
        if self.method not in list_methods():
            return given
        defaults = default_settings(method_class(self.method))
        return {k: v for k, v in given.items() if _plain(v) != _plain(defaults.get(k))}


def _plain(value: Any) -> Any:
    """As JSON has it: tuples are lists there."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


Known = dict[tuple[str, ...], tuple[str, ...]]
"""Sample ids that were seen, so that cells with equal ones share them; whoever reads many files owns one for that time."""


def condense(content: Mapping[str, Any], known: Known | None = None, name: str = "result") -> Condensed:
    """Returns what tables need of the content of a result file.

    Args:
        content: of the file.
        known: sample ids seen so far; equal ones are shared, new ones added.
        name: of the file, for the message.

    Raises:
        ResultError: something that every result has is missing.
    """
    try:
        fingerprint = content["fingerprint"]
        found: dict[str, dict[str, float]] = {}
        for sample in content["samples"]:
            found.setdefault(sample["family"], {})[sample["id"]] = float(sample["correct"])
        retained = [count for sample in content["samples"] for count in sample.get("retained", ())]
        timed = content.get("conditions", {}).get("tower") != "shared"
        return Condensed(
            key=content_hash(fingerprint),
            fingerprint=fingerprint,
            numbers={k: v for k, v in _numbers(content["summary"]).items() if timed or not k.endswith("_ms")},
            metrics=_numbers(content["summary"].get("metrics") or {}),
            families={family: _outcomes(own, {} if known is None else known) for family, own in found.items()},
            most_retained=max(retained, default=None),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{name}: {type(error).__name__} {error} in its content; run the cell again with this version") from None


def _outcomes(values: Mapping[str, float], known: Known) -> Outcomes:
    """Returns outcomes ordered by id; equal ids of many cells are kept once."""
    ids = tuple(sorted(values))
    return Outcomes(known.setdefault(ids, ids), np.asarray([[values[i] for i in ids]]))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}


def make_rows(cells: Iterable[Mapping[str, Any] | Condensed]) -> list[Row]:
    """Returns rows in the order in which their experiments first appear; a cell that comes twice counts once.

    Args:
        cells: contents of result files of one task, or what `condense` left of them.
    """
    groups: dict[Any, dict[str, Condensed]] = {}
    known: Known = {}
    for given in cells:
        cell = given if isinstance(given, Condensed) else condense(given, known)
        experiment = content_hash({**cell.fingerprint, "seed": None})
        samples = tuple(sorted((family, outcomes.ids) for family, outcomes in cell.families.items()))
        groups.setdefault((experiment, samples), {}).setdefault(cell.key, cell)
    seeds = [sorted(group.values(), key=lambda cell: str(cell.fingerprint["seed"])) for group in groups.values()]
    outcomes = [_stack(own) for own in seeds]
    alike: dict[Any, list[int]] = {}  # indices of the rows that have the same samples
    for index, (_, samples) in enumerate(groups):
        alike.setdefault(samples, []).append(index)
    families: list[dict[str, Interval]] = [{} for _ in groups]
    keys = [key for key, _ in groups]
    for indices in alike.values():
        for family in outcomes[indices[0]]:
            own = accuracies([outcomes[i][family].values for i in indices], family, [keys[i] for i in indices])
            for i, one in zip(indices, own, strict=True):
                families[i][family] = one
    return [_row(*parts) for parts in zip(keys, seeds, outcomes, families, strict=True)]


def _stack(cells: Sequence[Condensed]) -> dict[str, Outcomes]:
    """Returns the outcomes of all seeds by family."""
    return {f: Outcomes(own.ids, np.concatenate([cell.families[f].values for cell in cells])) for f, own in cells[0].families.items()}


def _row(key: str, cells: Sequence[Condensed], groups: Mapping[str, Outcomes], families: Mapping[str, Interval]) -> Row:
    first = cells[0]
    return Row(
        key=key,
        fingerprint=first.fingerprint,
        seeds=tuple(sorted(cell.fingerprint["seed"] for cell in cells if cell.fingerprint["seed"] is not None)),
        groups=groups,
        families=families,
        macro=combine(list(families.values())),
        means=_means([cell.numbers for cell in cells]),
        metrics=_means([cell.metrics for cell in cells]),
        most_retained=max((cell.most_retained for cell in cells if cell.most_retained is not None), default=None),
    )


def _means(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(own[name] for own in numbers) / len(numbers) for name in numbers[0] if all(name in own for own in numbers)}


def percent(interval: Interval) -> str:
    """Returns an interval in percent: `94.2 (91.8-95.9)`."""
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f}-{100 * interval.high:.1f})"
