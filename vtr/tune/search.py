"""The search: which candidate of several lines meets a target, with as few measurements as the order within a line allows.

A line is one method with one choice of settings; its candidates are its budgets, from the most tokens to the fewest. Fewer tokens are taken to be
faster and less accurate, so that a line is bisected. Lines compete on few samples first, and the better half goes on with twice as many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from vtr.eval.stats import Interval
from vtr.tune.target import Target

C = TypeVar("C", bound=Hashable)
C_contra = TypeVar("C_contra", bound=Hashable, contravariant=True)


class OutOfTime(Exception):
    """The time limit is over; what was measured is kept."""


class CannotRun(Exception):
    """A candidate cannot be run; the message says why."""


class Evaluator(Protocol[C_contra]):
    """Measures candidates; both may raise `OutOfTime` and `CannotRun`, and remember what they measured."""

    def loss(self, candidate: C_contra, stage: int) -> Interval:
        """Returns the accuracy lost against the full model on the samples of a stage and all before it."""

    def speed(self, candidate: C_contra) -> Interval:
        """Returns how many times faster than the full model."""


@dataclass
class Line(Generic[C]):
    """A line and how far it came.

    Args:
        name: for messages.
        candidates: from the most tokens to the fewest.
        place: of the candidate that stands for it; `len(candidates)` or -1 where none meets the target.
        loss, speed: of that candidate.
        stage: of the samples that `loss` is from; -1 before the first.
        why_not: it is out of the race for this reason.
    """

    name: str
    candidates: Sequence[C]
    place: int | None = None
    loss: Interval | None = None
    speed: Interval | None = None
    stage: int = -1
    why_not: str = ""

    @property
    def candidate(self) -> C | None:
        """The candidate that stands for the line."""
        inside = self.place is not None and 0 <= self.place < len(self.candidates)
        return self.candidates[self.place] if inside and self.place is not None else None


@dataclass
class Found(Generic[C]):
    """What a search came to.

    Args:
        lines: all, as far as they came.
        chosen: the line whose candidate is taken, None where none meets the target.
        level: how sure it is of that candidate, see `Target.holds`.
        finished: the search came to its end; else time was over.
    """

    lines: list[Line[C]]
    chosen: Line[C] | None = None
    level: float = 0
    finished: bool = False
    fastest: dict[str, Interval] = field(default_factory=dict)


def search(lines: Sequence[Line[C]], target: Target, evaluator: Evaluator[C], stages: int) -> Found[C]:
    """Returns the best candidate for a target.

    For a loss it is the fastest whose loss is within the target, for a speed the one that loses least of those that are fast enough. In the last
    stage, and for speeds, the highest of the target's levels counts at which there is a candidate: what is chosen by its estimate alone is, as
    often as not, worse than that.

    Args:
        lines: with candidates; changed in place.
        target: what is asked for.
        evaluator: measures.
        stages: number of stages of samples.
    """
    found = Found(list(lines))
    try:
        if target.kind == "speed":
            for line in lines:
                _tried(line, partial(_find_speed, line, target, evaluator, found))
        left = [line for line in lines if not line.why_not]
        for stage in range(stages):
            last = stage == stages - 1
            for line in left:
                _tried(line, partial(_advance, line, target, evaluator, stage, last))
            left = _ranked([line for line in left if not line.why_not], target)
            if not last:
                left = left[: max(2, -(-len(left) // 2))]
        found.finished = True
    except OutOfTime:
        pass
    top = max((line.stage for line in lines if not line.why_not), default=-1)
    furthest = [line for line in lines if line.stage == top]
    for among, level in itertools.product((furthest, lines), target.levels):
        ranked = _ranked([line for line in among if _fits(line, target, level)], target)
        if ranked:
            found.chosen, found.level = ranked[0], level
            break
    return found


def _tried(line: Line[C], step: Callable[[], None]) -> None:
    """Takes a step of a line; one that cannot run is out."""
    try:
        step()
    except CannotRun as error:
        line.why_not = str(error)


def _find_speed(line: Line[C], target: Target, evaluator: Evaluator[C], found: Found[C]) -> None:
    """Sets a line to its most tokens that are fast enough; out of the race where none are."""
    candidates = line.candidates
    for level in target.levels:
        slow = boundary(len(candidates), lambda i, level=level: not target.holds(evaluator.speed(candidates[i]), level))  # type: ignore[misc]
        if slow + 1 < len(candidates):
            line.place, line.speed = slow + 1, evaluator.speed(candidates[slow + 1])
            return
    line.place = len(candidates)
    best = found.fastest[line.name] = evaluator.speed(candidates[-1])
    line.why_not = f"not fast enough: {best.value:.2f}x at its fewest tokens"


def _advance(line: Line[C], target: Target, evaluator: Evaluator[C], stage: int, last: bool) -> None:
    """Takes a line to the next stage; for a loss, with the fewest tokens that are within the target there."""
    candidates = line.candidates
    if target.kind == "speed":
        assert line.candidate is not None
        line.loss, line.stage = evaluator.loss(line.candidate, stage), stage
        return
    place = -1
    for level in target.levels if last else (0,):
        ok = lambda i, level=level: target.holds(evaluator.loss(candidates[i], stage), level)  # noqa: E731
        place = boundary(len(candidates), ok, line.place)  # type: ignore[arg-type]
        if place >= 0:
            break
    best = candidates[max(place, 0)]
    line.loss, line.speed = evaluator.loss(best, stage), evaluator.speed(best)
    line.place, line.stage = place, stage


def boundary(count: int, holds: Callable[[int], bool], guess: int | None = None) -> int:
    """Returns the last of `count` places at which something holds that holds up to a place and not behind it; -1 where it holds nowhere.

    Args:
        count: places.
        holds: is asked as seldom as possible.
        guess: a place near which the boundary is believed to be: asked first, then ever further away from it until it is between two places.
    """
    low, high, step = -1, count, 1
    middle = (count - 1) // 2 if guess is None else min(max(guess, 0), count - 1)
    while high - low > 1:
        low, high = (middle, high) if holds(middle) else (low, middle)
        if guess is None or (low >= 0 and high < count):
            middle = (low + high) // 2
        else:
            middle = min(low + step, high - 1) if high == count else max(high - step, low + 1)
            step *= 2
    return low


def _fits(line: Line[C], target: Target, level: float) -> bool:
    """Tells whether the candidate of a line may be chosen."""
    if line.why_not or line.candidate is None or line.loss is None or line.speed is None:
        return False
    return target.holds(line.speed if target.kind == "speed" else line.loss, level)


def _ranked(lines: Sequence[Line[C]], target: Target) -> list[Line[C]]:
    """Returns lines from the best to the worst: the least loss where speed is asked for, the most speed where loss is."""

    def worth(line: Line[C]) -> tuple[bool, float]:
        assert line.loss is not None and line.speed is not None
        missing = line.candidate is None
        return missing, line.loss.value if missing or target.kind == "speed" else -line.speed.value

    return sorted(lines, key=worth)
