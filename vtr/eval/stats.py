"""95 % intervals for accuracies and for differences of accuracies over the same samples.

Everything is in shares (0 to 1). Random numbers come from a fixed seed, so that a table made twice is the same table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 4000


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(correct: int, total: int) -> Interval:
    """Wilson's score interval of a share; sensible also at 0 and 1 and for few samples.

    Raises:
        ValueError: no samples, or more correct ones than samples.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"wilson: needs 0 <= correct <= total and total >= 1, got correct={correct}, total={total}")
    share = correct / total
    scale = 1 + Z95**2 / total
    middle = (share + Z95**2 / (2 * total)) / scale
    half = Z95 / scale * (share * (1 - share) / total + Z95**2 / (4 * total**2)) ** 0.5
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def accuracy(outcomes: Sequence[float]) -> Interval:
    """Interval of the mean outcome of one group of samples.

    Args:
        outcomes: per sample 0 or 1, or a mean over seeds in between; Wilson for the former, bootstrap over samples for the latter.
    """
    if not outcomes:
        raise ValueError("accuracy: every group needs at least one sample, got an empty one")
    if all(value in (0, 1) for value in outcomes):
        return wilson(int(sum(outcomes)), len(outcomes))
    return _bootstrap([np.asarray(outcomes, dtype=float)])


def macro_accuracy(groups: Mapping[str, Sequence[float]]) -> Interval:
    """Interval of the unweighted mean over groups of their mean outcomes.

    The groups' own intervals are combined by their distances from the estimates (MOVER: Zou and Donner, Statistics in Medicine 2008), so that
    groups with all answers right or wrong still count with their uncertainty.

    Args:
        groups: group -> outcomes as for `accuracy`.
    """
    own = [accuracy(values) for values in groups.values()]
    mean = sum(one.value for one in own) / len(own)
    down = sum((one.value - one.low) ** 2 for one in own) ** 0.5 / len(own)
    up = sum((one.high - one.value) ** 2 for one in own) ** 0.5 / len(own)
    return Interval(mean, max(0.0, mean - down), min(1.0, mean + up))


def paired_difference(first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]) -> Interval:
    """Interval of macro accuracy of `first` minus `second` over the same samples, resampled in pairs.

    Args:
        first, second: group -> sample id -> outcome.

    Raises:
        ValueError: the two do not have the same samples.
    """
    if {g: set(s) for g, s in first.items()} != {g: set(s) for g, s in second.items()}:
        raise ValueError("paired_difference: both need outcomes of the same samples; evaluate both on the same task and limit")
    return _bootstrap([np.asarray([samples[i] - second[group][i] for i in samples]) for group, samples in first.items()])


def _bootstrap(groups: Sequence[np.ndarray]) -> Interval:
    """Percentile bootstrap of the mean over groups, resampled inside each group."""
    dice = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for values in groups:
        means += values[dice.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means / len(groups), (0.025, 0.975))
    return Interval(float(np.mean([values.mean() for values in groups])), float(low), float(high))
