"""A whole tuning: search, then measure the chosen candidate again on samples and rounds that had no part in choosing it."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from vtr.eval.report.plots import pareto
from vtr.eval.run.cells import Cell
from vtr.eval.run.forecast import final_keep, forecast
from vtr.eval.run.setup import Setup, sketch
from vtr.eval.stats import Interval
from vtr.planning import plan
from vtr.tune.measure import FINAL_ROUNDS, Held, Measurer
from vtr.tune.search import CannotRun, Found, Line, OutOfTime, search
from vtr.tune.space import Candidate, Space
from vtr.tune.target import Target, Verdict, loss_in_words, points, speed_in_words
from vtr.types.errors import WrongValue

SEARCH_SHARE = 0.6
"""Part of a time limit after which the search begins nothing new, so that the chosen candidate can be measured again."""


@dataclass(frozen=True)
class Point:
    """A candidate as the search measured it.

    Args:
        loss: on so many `samples`.
        retained: visual tokens left of an image.
        front: no other point is both faster and better.
    """

    label: str
    loss: Interval
    samples: int
    speed: Interval | None
    retained: float
    front: bool


@dataclass
class Tuned:
    """What a tuning came to.

    Args:
        target: what was asked for.
        points: every candidate whose loss was measured, the fastest first.
        found: of the search.
        accuracy: of the full model on the samples of the search that were run.
        held: of the chosen candidate on held-out samples, None where there was no time.
        tried: every candidate that was asked on held-out samples, in order.
        speed: of the chosen candidate in rounds of its own, None where there was no time.
        plan: of the chosen candidate, as `Plan.to_dict`.
        tokens: visual tokens of an image in the full model.
        notes: what else is worth a sentence.
    """

    target: Target
    points: list[Point]
    found: Found[Candidate]
    accuracy: float
    tokens: float
    held: Held | None = None
    tried: list[tuple[Candidate, Held]] = field(default_factory=list)
    speed: Interval | None = None
    plan: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that is recommended."""
        return self.found.chosen.candidate if self.found.chosen else None

    @property
    def verdict(self) -> Verdict | None:
        """What the second measurement says about the target; None where there was none."""
        decisive = self.speed if self.target.kind == "speed" else self.held.loss if self.held else None
        return self.target.verdict(decisive) if decisive else None

    @property
    def sentences(self) -> list[str]:
        """What was found and how sure that is, in words."""
        if self.chosen is None:
            return [self._nothing(), *self.notes]
        said = [f"{self.chosen.label} is chosen for the target, {self.target}"]
        said.append(
            loss_in_words(self.target, self.held.loss, self.held.samples) if self.held else "time is over: its loss is not confirmed"
        )
        if len(self.tried) > 1:
            names = ", ".join(candidate.label for candidate, _ in self.tried)
            said.append(
                f"held-out samples were asked with {names}, in this order, until one was not shown to be within the target or none was left"
            )
        said.append(speed_in_words(self.target, self.speed, FINAL_ROUNDS) if self.speed else "time is over: its speed is not confirmed")
        return [*said, *self.notes]

    def _nothing(self) -> str:
        measured = [one for one in self.points if one.speed is not None]
        if not measured:
            return "nothing was measured to the end; give it more time"
        best = min(measured, key=lambda one: one.loss.value)
        return f"no candidate is within {self.target}; the least loss is that of {best.label}: {points(best.loss.value)}, {best.samples} samples"


def tune(space: Space, target: Target, measurer: Measurer, setup: Setup, minutes: float | None) -> Tuned:
    """Searches a space and confirms what was chosen.

    Args:
        space: what is searched.
        target: what is asked for.
        measurer: of the model.
        setup: the model.
        minutes: nothing begins after so long; None = no limit.

    Raises:
        ValueError: no line can be as fast as the target, or none can run.
    """
    start = time.monotonic()
    if minutes is not None:
        measurer.until = start + 60 * SEARCH_SHARE * minutes
    found = search(space.lines, target, measurer, measurer.split.stages)
    lines = space.lines
    if all(line.why_not for line in lines):
        slow = found.fastest
        if not slow:
            raise WrongValue(
                f"--methods: none can be measured on {setup.model}: {'; '.join(f'{one.name}: {one.why_not}' for one in lines)}"
            )
        raise WrongValue(_out_of_reach(space, target, found, measurer, setup))
    tuned = Tuned(target, [], found, measurer.accuracy, measurer.retained.get(None, 0.0))
    if minutes is not None:
        measurer.until = start + 60 * minutes
    with suppress(OutOfTime):
        if found.chosen is not None:
            _confirm(tuned, found.chosen, measurer)
            if tuned.chosen is not None and tuned.chosen not in measurer.losses:
                measurer.loss(tuned.chosen, measurer.split.stages - 1)  # for the table
        for candidate in measurer.losses:
            with suppress(CannotRun):  # a line is out then, and says so
                measurer.speed(candidate)
    if tuned.chosen is not None:
        tuned.plan = plan(sketch(setup), tuned.chosen.method, question="").to_dict()
    tuned.points, tuned.notes = _points(measurer), _notes(found, target)
    return tuned


def _confirm(tuned: Tuned, line: Line[Candidate], measurer: Measurer) -> None:
    """Measures what was chosen again. Where its loss is within the target, the next one with fewer tokens is tried, as long as that is so.

    Their order was fixed before, and the first that fails ends it, so that no more than 2.5 % of the results are wrong however many are tried
    (testing in a fixed sequence: Maurer, Hothorn and Lehmacher 1995).
    """
    candidates, place = line.candidates, line.place or 0
    if tuned.target.kind == "speed":
        tuned.speed = measurer.speed(candidates[place], FINAL_ROUNDS)
        tuned.held = measurer.held_out(candidates[place])
        tuned.tried.append((candidates[place], tuned.held))
        return
    with suppress(OutOfTime, CannotRun):
        for further in range(place, len(candidates)):
            known = measurer.losses.get(candidates[further])
            if tuned.held is not None and known is not None and not tuned.target.holds(known[0], 0):
                break
            held = measurer.held_out(candidates[further])
            tuned.tried.append((candidates[further], held))
            met = tuned.target.verdict(held.loss) == "met"
            if met or tuned.held is None:
                tuned.held, line.place = held, further
            if not met:
                break
    assert line.candidate is not None
    tuned.speed = measurer.speed(line.candidate, FINAL_ROUNDS)


def _points(measurer: Measurer) -> list[Point]:
    losses = list(measurer.losses.items())
    timed = [i for i, (one, _) in enumerate(losses) if one in measurer.speeds]
    costs = [(1 / measurer.speeds[losses[i][0]].value, -losses[i][1][0].value) for i in timed]
    front = {[*timed, None][i] for i in pareto([*costs, (1.0, 0.0)])}  # the full model may be better than all that are slower
    made = [
        Point(one.label, loss, samples, measurer.speeds.get(one), measurer.retained[one], i in front)
        for i, (one, (loss, samples)) in enumerate(losses)
    ]
    return sorted(made, key=lambda point: -(point.speed.value if point.speed else 0.0))


def _notes(found: Found[Candidate], target: Target) -> list[str]:
    notes = []
    if not found.finished:
        left = [line.name for line in found.lines if line.stage < 0 and not line.why_not]
        notes.append("time was over before the search was" + (f"; not compared: {', '.join(left)}" if left else ""))
    if found.chosen is not None and found.level < 1:
        notes.append(f"in the search only its estimate met {target}, not the whole interval, so that it may well miss it")
    notes += [f"{line.name}: {line.why_not}" for line in found.lines if line.why_not]
    return notes


def _out_of_reach(space: Space, target: Target, found: Found[Candidate], measurer: Measurer, setup: Setup) -> str:
    """Returns why no line is fast enough, and what would be the limit of any that leaves the tower alone."""
    name, best = max(found.fastest.items(), key=lambda item: item[1].value)
    line = next(line for line in space.lines if line.name == name)
    cell = Cell(line.candidates[-1].method, measurer.split.tasks[0])
    made = forecast(setup, cell)
    keep = (final_keep(setup, cell, 0) if cell.methods[0].budget else None) or (made.retained if made else None)
    floor = measurer.floor(keep) if keep else None
    limit = f"; the kept floor with {keep} tokens, the limit of methods behind the tower, is {floor.value:.2f}x" if floor else ""
    return (
        f"--target: {target.value:g}x is out of reach: the fastest candidate, {line.candidates[-1].label}, is {best.value:.2f}x{limit}; "
        "ask for less, allow a smaller --keep, or take methods that act in the tower (vtr list --stage tower, or --stage input)"
    )
