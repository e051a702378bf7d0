"""Samples of tasks in two halves, one for the search and one that is held out, and each of them in slices that are never run twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

from vtr.eval.run.cells import Cell
from vtr.eval.tasks import Task
from vtr.tune.target import Target, fewest_samples
from vtr.types import Method
from vtr.types.errors import WrongValue

Half = Literal["search", "held-out"]
SLICES = ((0, 1), (1, 2), (2, 4), (4, 8))
"""Eighths of a half, in the order in which they are run; each time there are twice as many samples."""
FEW = 40
"""Samples of all families with which candidates are compared first, at least."""
USUAL = 200
"""Samples of each family of which half is for the search, where nobody says how many."""


@dataclass(frozen=True)
class Split:
    """The samples of some tasks.

    Args:
        tasks: what is asked; the score is the mean of theirs.
        limit: at most so many samples of each family, both halves together; None for all.
    """

    tasks: tuple[Task, ...]
    limit: int | None

    def cells(self, method: Method | None, seed: int | None, half: Half, part: tuple[int, int]) -> dict[str, Cell]:
        """Returns the cells of a slice of a half: name of a task -> its cell, where there are samples."""
        made = {task.name: Cell(method, self._part(task, half, part), seed, self.limit) for task in self.tasks}
        return {name: cell for name, cell in made.items() if cell.task.samples(self.limit)}

    def slices(self, stage: int) -> list[tuple[int, int]]:
        """Returns the slices of a stage of the search: a prefix of `SLICES`."""
        return list(SLICES[: self._first + stage + 1])

    @cached_property
    def stages(self) -> int:
        """Number of stages of the search."""
        return len(SLICES) - self._first

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Task and family -> its samples, both halves together."""
        found: dict[str, int] = {}
        for task in self.tasks:
            for family, samples in _families(task, self.limit).items():
                found[f"{task.name}/{family}"] = len(samples)
        return found

    @cached_property
    def weights(self) -> dict[str, float]:
        """Task and family -> its weight in the score."""
        families = [[name for name in self.sizes if name.startswith(f"{task.name}/")] for task in self.tasks]
        return {name: 1 / len(families) / len(own) for own in families for name in own}

    @property
    def held_out(self) -> float:
        """How many samples of one family the held-out ones are worth; fewer than there are where small families weigh much."""
        return round(1 / sum(self.weights[name] ** 2 / (size - size // 2) for name, size in self.sizes.items()), 1)

    def prompts(self, count: int) -> list[Any]:
        """Returns samples of the search, spread evenly."""
        samples = [sample for task in self.tasks for sample in self._part(task, "search", (0, 8)).samples(self.limit)]
        return [samples[i * len(samples) // count] for i in range(min(count, len(samples)))]

    @cached_property
    def _first(self) -> int:
        """Index of the first slice up to which there are enough samples, and some of every family."""
        for index, (_, stop) in enumerate(SLICES):
            counts = [size // 2 * stop // 8 for size in self.sizes.values()]
            if min(counts) >= 1 and sum(counts) >= FEW:
                return index
        return len(SLICES) - 1

    def _part(self, task: Task, half: Half, part: tuple[int, int]) -> Task:
        name = f"{task.name} {half} {part[0]}-{part[1]} of 8"
        return replace(task, name=name, samples=partial(_cut, task, half, part), metrics=None)


def make_split(tasks: Sequence[Task], limit: int | None, target: Target) -> Split:
    """Returns the samples with which a target can be decided.

    Args:
        tasks: what is asked.
        limit: of samples of each family; None = `USUAL`, or what holds out twice as many as can show the target at all.
        target: a loss needs enough held-out samples.

    Raises:
        ValueError: tasks with videos, or too few samples to show the target even where no answer changes.
    """
    for task in tasks:
        if task.frames:
            raise WrongValue(f"--tasks: tune times prompts with images, and {task.name} has videos; compare methods on it with vtr eval")
    if limit is not None and limit < 4:
        raise WrongValue(f"--limit: half of the samples is for the search and half is held out, so at least 4 are needed, got {limit}")
    needed = fewest_samples(target.value) if target.kind == "loss" else 0
    split = Split(tuple(tasks), limit or USUAL)
    if limit is None and split.held_out < 2 * needed:
        most = max(Split(split.tasks, None).sizes.values())
        split = Split(split.tasks, min(math.ceil(USUAL * 2 * needed / split.held_out), most))
    for name, size in split.sizes.items():
        if size < 4:
            raise WrongValue(f"--tasks: every family needs at least 4 samples, {name} has {size}; take another task")
    if split.held_out < needed:
        asked = math.ceil((split.limit or USUAL) * needed / split.held_out)
        way = "take a larger task, or ask for less" if limit is None else f"give --limit {asked} or more, if there are as many"
        raise WrongValue(
            f"--limit: at most {100 * target.value:g} points of loss are shown by {needed} held-out samples or more, even if no answer changes, "
            f"and {split.limit} samples of each family hold out {split.held_out:.0f}; {way}"
        )
    return split


def _families(task: Task, limit: int | None) -> Mapping[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for sample in task.samples(limit):
        found.setdefault(sample.family, []).append(sample)
    return found


def _cut(task: Task, half: Half, part: tuple[int, int], limit: int | None) -> list[Any]:
    """Returns a slice of a half of every family."""
    found: list[Any] = []
    for samples in _families(task, limit).values():
        middle = len(samples) // 2
        own = samples[:middle] if half == "search" else samples[middle:]
        found += own[len(own) * part[0] // 8 : len(own) * part[1] // 8]
    return found
