"""Targets, and what a measurement says about them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from vtr.eval.stats import Z95, Interval
from vtr.types.errors import WrongValue

Verdict = Literal["met", "not shown", "missed"]
"""`met` and `missed`: the whole 95 % interval is on that side of the target; `not shown`: the target lies within it."""

ROOM = 1.65
"""Times the length of an interval to one side at which the same measurement on other samples has its whole interval there in nine of ten cases."""

_FACTOR = re.compile(r"(?:>=|≥)?\s*(\d+(?:\.\d+)?)\s*(?:x|×)")
_POINTS = re.compile(r"(?:<=|≤)?\s*(\d+(?:\.\d+)?)\s*points?")


@dataclass(frozen=True)
class Target:
    """What is asked for.

    Args:
        kind: `speed`: at least `value` times faster than the full model; `loss`: at most `value` of accuracy lost against it.
        value: the factor, or the loss as a share.
    """

    kind: Literal["speed", "loss"]
    value: float

    def __str__(self) -> str:
        return f"at least {self.value:g}x" if self.kind == "speed" else f"at most {points(self.value, '.4g')}"

    @property
    def levels(self) -> tuple[float, ...]:
        """How sure the search wants to be, in the order in which it is tried; see `holds`.

        A loss has `ROOM`, because it is measured again on no more samples; a speed has not, because it is measured in more rounds.
        """
        return (1, 0) if self.kind == "speed" else (ROOM, 1, 0)

    def holds(self, found: Interval, level: float) -> bool:
        """Tells whether an estimate is on the right side of the target: 0 = by itself, 1 = with its whole interval, more = with room beyond it."""
        if self.kind == "speed":
            return found.value - level * (found.value - found.low) >= self.value
        return found.value + level * (found.high - found.value) <= self.value

    def verdict(self, found: Interval) -> Verdict:
        """Returns what an interval says about the target."""
        if self.holds(found, 1):
            return "met"
        beyond = found.high < self.value if self.kind == "speed" else found.low > self.value
        return "missed" if beyond else "not shown"


def read_target(text: str) -> Target:
    """Reads `1.5x` or `<=1 point`.

    Raises:
        ValueError: it is neither, or asks for nothing.
    """
    if match := _FACTOR.fullmatch(text.strip()):
        factor = float(match[1])
        if factor <= 1:
            raise WrongValue(f"--target: a speed factor must be above 1x, got {text!r}; the full model is 1x")
        return Target("speed", factor)
    if match := _POINTS.fullmatch(text.strip()):
        lost = float(match[1])
        if not 0 < lost < 100:
            raise WrongValue(f"--target: a loss must be above 0 and below 100 points, got {text!r}; no number of samples shows a loss of 0")
        return Target("loss", lost / 100)
    raise WrongValue(
        f"--target: must be a speed factor such as '1.5x' or a loss such as '<=1 point', got {text!r}; a loss is in points of accuracy"
    )


def points(share: float, form: str = ".1f") -> str:
    """Returns a share as points: `1 point`, `-0.4 points`."""
    number = format(100 * share, form)
    return f"{number} point{'' if float(number) == 1 else 's'}"


def fewest_samples(lost: float) -> int:
    """Returns how many samples can show a loss to be within `lost` at all: when not one of their answers changes."""
    return math.ceil(Z95**2 * (1 / lost - 1))


def samples_needed(found: Interval, samples: int, lost: float) -> int | None:
    """Returns how many samples would show a loss to be within `lost` if it is as estimated; None where it is above."""
    if found.value >= lost:
        return None
    return max(math.ceil(samples * ((found.high - found.value) / (lost - found.value)) ** 2), fewest_samples(lost))


def loss_in_words(target: Target, found: Interval, samples: int) -> str:
    """Returns how sure it is what a reduction loses, from samples that had no part in choosing it."""
    text = (
        f"the loss is {points(found.value)}, 95 % interval {100 * found.low:.1f} to {100 * found.high:.1f}, on {samples} held-out samples"
    )
    if target.kind == "speed":
        return text
    verdict = target.verdict(found)
    if verdict == "met":
        return f"{text}: within {points(target.value, '.4g')}"
    if verdict == "missed":
        return f"{text}: more than {points(target.value, '.4g')}"
    needed = samples_needed(found, samples, target.value)
    more = f"about {rounded(needed)} would be needed" if needed else "the estimate itself is above it, so that more samples are no remedy"
    return f"{text}: not shown to be within {points(target.value, '.4g')}; {more}"


def speed_in_words(target: Target, found: Interval, rounds: int) -> str:
    """Returns how sure it is how much faster a reduction is, from rounds that had no part in choosing it."""
    text = f"it is {found.value:.2f} times faster, 95 % interval {found.low:.2f} to {found.high:.2f}, in {rounds} rounds"
    if target.kind == "loss":
        return text if found.low > 1 else f"{text}: not shown to be faster than the full model"
    said = {"met": "at least", "missed": "less than", "not shown": "not shown to be at least"}[target.verdict(found)]
    return f"{text}: {said} {target.value:g} times"


def rounded(count: int) -> int:
    """Returns a count with two digits that say something, upwards: 1234 -> 1300."""
    size = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // size) * size
