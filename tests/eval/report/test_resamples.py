"""Ranks, fronts and pairs against brute force and against their own claims."""

import numpy as np
import pytest

from tests.eval.report.made import cell, soft
from vtr.eval.report.plots import pareto
from vtr.eval.report.resamples import Resamples
from vtr.eval.stats import RESAMPLES, accuracy, paired_difference, resampled_means
from vtr.eval.summary import make_rows


def test_columns_see_the_same_samples_and_groups_do_not():
    values = np.random.default_rng(0).random((1, 50))
    means = resampled_means([values, values + 1], "a")
    assert means.shape == (RESAMPLES, 2) and np.allclose(means[:, 1] - means[:, 0], 1)
    assert not np.allclose(means[:, 0], resampled_means([values], "b")[:, 0])
    assert np.allclose(means[:, 0], resampled_means([values], "a")[:, 0])
    assert means[:, 0].std() == pytest.approx(values.std() / 50**0.5, rel=0.05)


def test_many_samples_are_drawn_in_pieces_with_the_right_spread():
    values = (np.arange(20_000) % 2).astype(float)[None]
    means = resampled_means([values])[:, 0]
    assert means.shape == (RESAMPLES,) and means.std() == pytest.approx(0.5 / 20_000**0.5, rel=0.05)


def test_seeds_that_differ_on_all_samples_alike_widen_the_interval_and_others_do_not():
    dice = np.random.default_rng(0)
    apart = (dice.random((5, 400)) < np.linspace(0.3, 0.7, 5)[:, None]).astype(float)
    shuffled = dice.permuted(apart, axis=0)
    wide, narrow = (accuracy(values) for values in (apart, shuffled))
    assert wide.value == pytest.approx(narrow.value)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert resampled_means([shuffled])[:, 0].std() == pytest.approx(shuffled.mean(0).std() / 20, rel=0.3)


def test_differences_agree_with_the_pair_by_pair_bootstrap():
    dice = np.random.default_rng(1)
    rows = make_rows([soft(dice.random(200).round(), keep=keep) for keep in (1, 2)])
    both = Resamples(rows, "t").difference(*rows), paired_difference(rows[0].outcomes, rows[1].outcomes)
    assert both[0].value == pytest.approx(both[1].value)
    assert both[0] == pytest.approx(both[1], abs=0.01)  # other dice


def test_relative_accuracy_is_narrower_than_unpaired_rows_would_allow():
    rows = make_rows([cell("full", 0.6), cell("fastv", 0.55, keep=64)])
    relative = Resamples(rows, "t").relative(rows[1], rows[0])
    assert relative.value == pytest.approx(0.55 / 0.6)
    assert relative.high - relative.low < (rows[1].macro.high - rows[1].macro.low) / 0.6
    nothing = make_rows([cell("full", 0.0), cell("fastv", 0.5, keep=64)])
    assert Resamples(nothing, "t").relative(nothing[1], nothing[0]) is None


def test_ranks_share_ties_and_their_intervals_hold_them():
    shares = (0.9, 0.5, 0.5, 0.48, 0.1)
    rows = make_rows([cell("random", share, keep=keep + 1) for keep, share in enumerate(shares)])
    ranks = Resamples(rows, "t").ranks(rows)
    assert [rank.value for rank in ranks] == [1, 2, 2, 4, 5]
    assert all(rank.low <= rank.value <= rank.high for rank in ranks)
    assert (ranks[0].low, ranks[0].high, ranks[-1].low, ranks[-1].high) == (1, 1, 5, 5)
    assert [r.value for r in Resamples(rows, "t").ranks(rows, "text")] == [1, 2, 2, 4, 5]


def test_ranks_that_samples_cannot_decide_have_wide_intervals():
    dice = np.random.default_rng(2)
    rows = make_rows([soft((dice.random(100) < 0.5).astype(float), keep=keep + 1) for keep in range(6)])
    ranks = Resamples(rows, "t").ranks(rows)
    assert np.mean([rank.high - rank.low for rank in ranks]) >= 2


def test_the_pareto_front_is_what_nothing_beats():
    dice = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(map(float, p)) for p in dice.integers(0, 6, (12, 2))]
        front = pareto(points)
        kept = {points[i] for i in front}
        beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
        assert kept == set(points) - beaten
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front) and len(kept) == len(front)
