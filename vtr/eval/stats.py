"""95 % intervals for accuracies and for differences of accuracies over the same samples.

Everything is in shares (0 to 1). Random numbers come from fixed seeds, so that a table made twice is the same table.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vtr.types.errors import WrongValue

Z95 = 1.959963984540054
RESAMPLES = 4000
_AT_ONCE = 4_000_000  # random numbers drawn together


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(correct: float, total: float) -> Interval:
    """Wilson's score interval of a share; sensible also at 0 and 1 and for few samples.

    Both may be fractions: a sum of outcomes from 0 to 1, whose interval is then on the wide side, or a number of samples that others amount to.

    Raises:
        ValueError: no samples, or more correct ones than samples.
    """
    if not 0 <= correct <= total or total < 1:
        raise WrongValue(f"wilson: needs 0 <= correct <= total and total >= 1, got correct={correct}, total={total}")
    share = correct / total
    scale = 1 + Z95**2 / total
    middle = (share + Z95**2 / (2 * total)) / scale
    half = Z95 / scale * (share * (1 - share) / total + Z95**2 / (4 * total**2)) ** 0.5
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def accuracy(outcomes: Sequence[float] | np.ndarray, key: str = "") -> Interval:
    """Returns the interval of the mean outcome of one group of samples: Wilson where every outcome is 0 or 1, else bootstrap.

    Args:
        outcomes: per sample `(n,)`, or per seed and sample `(S, n)`.
        key: of the row, see `resampled_means`.
    """
    values = np.atleast_2d(np.asarray(outcomes, dtype=float))
    if not values.size:
        raise WrongValue("accuracy: every group needs at least one sample, got an empty one")
    return accuracies([values], keys=[key])[0]


def accuracies(rows: Sequence[np.ndarray], group: str = "", keys: Sequence[str] = ()) -> list[Interval]:
    """Computes `accuracy` of many rows over the same samples, resampled once; arguments as for `resampled_means`."""
    means = [np.asarray(row, dtype=float).mean(0) for row in rows]
    found = {i: wilson(int(own.sum()), len(own)) for i, own in enumerate(means) if np.isin(own, (0, 1)).all()}
    others = [i for i in range(len(rows)) if i not in found]
    if others:
        resampled = resampled_means([rows[i] for i in others], group, [keys[i] for i in others] if keys else ()).clip(0, 1)
        found |= {i: interval(float(means[i].mean()), column) for i, column in zip(others, resampled.T, strict=True)}
    return [found[i] for i in range(len(rows))]


def macro_accuracy(groups: Mapping[str, Sequence[float] | np.ndarray], key: str = "") -> Interval:
    """Returns the interval of the unweighted mean over groups of their mean outcomes; arguments as for `accuracy`."""
    return combine([accuracy(values, key) for values in groups.values()])


def combine(groups: Sequence[Interval]) -> Interval:
    """Returns the interval of the unweighted mean of independent estimates.

    The groups' own intervals are combined by their distances from the estimates (MOVER: Zou and Donner, Statistics in Medicine 2008), so that
    groups with all answers right or wrong still count with their uncertainty.
    """
    mean = sum(one.value for one in groups) / len(groups)
    down = sum((one.value - one.low) ** 2 for one in groups) ** 0.5 / len(groups)
    up = sum((one.high - one.value) ** 2 for one in groups) ** 0.5 / len(groups)
    return Interval(mean, max(0.0, mean - down), min(1.0, mean + up))


def paired_difference(first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]) -> Interval:
    """Returns the interval of macro accuracy of `first` minus `second` over the same samples, resampled in pairs.

    Args:
        first, second: group -> sample id -> outcome.

    Raises:
        ValueError: the two do not have the same samples.
    """
    if {g: set(s) for g, s in first.items()} != {g: set(s) for g, s in second.items()}:
        raise WrongValue("paired_difference: both need outcomes of the same samples; evaluate both on the same task and limit")
    differences = {g: np.asarray([[samples[i] - second[g][i] for i in samples]]) for g, samples in first.items()}
    means = np.mean([resampled_means([values], name)[:, 0] for name, values in differences.items()], axis=0)
    return interval(float(np.mean([values.mean() for values in differences.values()])), means)


def paired_loss(
    full: Mapping[str, Mapping[str, float]], reduced: Mapping[str, Mapping[str, float]], weights: Mapping[str, float] | None = None
) -> Interval:
    """Returns the interval of the accuracy that `reduced` loses against `full` on the same samples, for decisions.

    Where no answer changes, resampling gives an interval from 0 to 0 however few samples there are. Here answers that became worse and answers
    that became better are two shares with Wilson's intervals, and their difference is combined as in `combine`.

    Args:
        full, reduced: group -> sample id -> outcome from 0 to 1.
        weights: of the groups, with sum 1; None = all alike.

    Raises:
        ValueError: no samples, or the two do not have the same.
    """
    if not full or {g: set(s) for g, s in full.items()} != {g: set(s) for g, s in reduced.items()}:
        raise WrongValue("paired_loss: both need outcomes of the same samples; evaluate both on the same task and limit")
    weights = weights or dict.fromkeys(full, 1 / len(full))
    changes = {g: np.asarray([samples[i] - reduced[g][i] for i in samples]) for g, samples in full.items()}
    size = 1 / sum(weights[g] ** 2 / len(change) for g, change in changes.items())  # of one group that is as uncertain
    worse, better = (sum(weights[g] * float((sign * change).clip(0).mean()) for g, change in changes.items()) for sign in (1, -1))
    lost, won = wilson(worse * size, size), wilson(better * size, size)
    value = lost.value - won.value
    shared = 2 * Z95**2 * lost.value * won.value / size  # no answer is in both, so that one is smaller where the other is larger
    down = ((lost.value - lost.low) ** 2 + (won.high - won.value) ** 2 + shared) ** 0.5
    up = ((lost.high - lost.value) ** 2 + (won.value - won.low) ** 2 + shared) ** 0.5
    return Interval(value, value - down, value + up)


def resampled_means(rows: Sequence[np.ndarray], group: str = "", keys: Sequence[str] = ()) -> np.ndarray:
    """Returns the mean outcomes of many rows over the same resampled samples, so that any two columns can be compared in pairs.

    Seeds of one row are averaged on each sample before the samples are resampled; what moves a seed on all samples alike is resampled over the
    seeds on top of that. O(RESAMPLES x samples x rows), as a matrix product.

    Args:
        rows: per row the outcomes `(S, n)` of its S seeds on the same n samples.
        group: name of the group of samples; other names give independent samples.
        keys: name of each row; a row's seeds are resampled alike in every group.

    Returns:
        Means `(RESAMPLES, rows)` float64.
    """
    columns = np.stack([np.asarray(row, dtype=float).mean(0) for row in rows], axis=1)  # (n, rows)
    means = np.concatenate([counts @ columns for counts in _sample_counts(len(columns), group)]) / len(columns)
    for index, row in enumerate(rows):
        if len(row) > 1:
            means[:, index] += _seed_shares(len(row), keys[index] if keys else "") @ _seed_effects(np.asarray(row, dtype=float))
    return means


def _seed_effects(outcomes: np.ndarray) -> np.ndarray:
    """Returns how much better each seed is on all samples alike `(S,)`, from outcomes `(S, n)`.

    Seeds also differ by chance when they act on every sample independently. The variance of their means is reduced by that part (variance
    components of a two-way layout by the method of moments: Searle, Casella and McCulloch, Variance Components, 1992), to zero at least.
    """
    seeds, samples = outcomes.shape
    means = outcomes.mean(1)
    between = means.var(ddof=1)
    chance = (outcomes - means[:, None] - outcomes.mean(0) + means.mean()).var() * seeds / (seeds - 1) / samples
    shared = max(0.0, 1 - chance / between) if between > 0 else 0.0
    return (means - means.mean()) * (shared * seeds / (seeds - 1)) ** 0.5


def interval(value: float, resampled: np.ndarray) -> Interval:
    """Returns the percentile interval `(RESAMPLES,)` around an estimate."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def _sample_counts(samples: int, group: str) -> Iterator[np.ndarray]:
    """Yields how often each sample was drawn: `(some resamples, samples)` float64, all resamples in pieces."""
    dice = np.random.default_rng((0, zlib.crc32(group.encode())))
    piece = max(1, _AT_ONCE // samples)
    for start in range(0, RESAMPLES, piece):
        count = min(piece, RESAMPLES - start)
        drawn = dice.integers(0, samples, (count, samples)) + np.arange(count)[:, None] * samples
        yield np.bincount(drawn.ravel(), minlength=count * samples).reshape(count, samples).astype(float)


def _seed_shares(seeds: int, key: str) -> np.ndarray:
    """Returns the share of each seed in each resample `(RESAMPLES, seeds)`."""
    dice = np.random.default_rng((1, zlib.crc32(key.encode())))
    return dice.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) / seeds
