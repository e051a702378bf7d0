"""Intervals against known values and against their own claims."""

import numpy as np
import pytest

from vtr.eval.stats import accuracy, macro_accuracy, paired_difference, paired_loss, wilson


def test_wilson_matches_published_values():  # Newcombe 1998, Statistics in Medicine 17, table I: 81/263, 15/148, 0/20
    for correct, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = wilson(correct, total)
        assert found.value == correct / total
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_stays_inside_zero_and_one():
    assert wilson(500, 500).high == 1.0
    assert wilson(0, 1).low == 0.0


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(correct, total):
    with pytest.raises(ValueError, match="0 <= correct <= total"):
        wilson(correct, total)


def test_accuracy_of_zeros_and_ones_is_wilson_and_of_seed_means_is_not():
    assert accuracy([1, 0, 1, 1]) == wilson(3, 4)
    several = accuracy([1, 2 / 3, 0, 1 / 3] * 50)
    assert several.value == pytest.approx(0.5)
    assert several.low < 0.5 < several.high


def test_macro_interval_is_near_the_bootstrap_and_keeps_its_width_at_the_ends():
    half = macro_accuracy({name: [0.0, 1.0] * 250 for name in "abcde"})
    assert half.high - half.value == pytest.approx(1.96 * (0.25 / 2500) ** 0.5, rel=0.02)
    assert macro_accuracy({"a": [0.0] * 20, "b": [0.0] * 20}).high > 0.05


def test_macro_weighs_groups_equally_and_is_the_same_every_time():
    groups = {"a": [1.0] * 10 + [0.0] * 10, "b": [1.0] * 500}
    assert macro_accuracy(groups).value == 0.75
    assert macro_accuracy(groups) == macro_accuracy(groups)


def test_pairing_sees_a_difference_that_single_intervals_do_not():
    better = {"a": {str(i): float(i % 2 == 0 or i < 30) for i in range(200)}}
    worse = {"a": {str(i): float(i % 2 == 0) for i in range(200)}}
    difference = paired_difference(better, worse)
    assert difference.value == pytest.approx(15 / 200)
    assert difference.low > 0
    assert accuracy(list(better["a"].values())).low < accuracy(list(worse["a"].values())).high


def test_pairing_refuses_other_samples():
    with pytest.raises(ValueError, match="same samples"):
        paired_difference({"a": {"1": 1.0}}, {"a": {"2": 1.0}})


def test_empty_groups_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        macro_accuracy({"a": []})


def test_a_loss_without_a_changed_answer_is_still_uncertain():
    same = {"a": {str(i): float(i % 3 == 0) for i in range(50)}}
    assert paired_difference(same, same) == (0, 0, 0)  # what resampling says
    assert paired_loss(same, same).value == 0
    assert paired_loss(same, same).high == pytest.approx(wilson(0, 50).high) == -paired_loss(same, same).low


def test_a_loss_weighs_its_groups():
    full = {"a": {str(i): 1.0 for i in range(10)}, "b": {str(i): 1.0 for i in range(1000)}}
    reduced = {"a": {str(i): float(i > 0) for i in range(10)}, "b": full["b"]}
    assert paired_loss(full, reduced).value == pytest.approx(0.05)
    assert paired_loss(full, reduced, {"a": 0.1, "b": 0.9}).value == pytest.approx(0.01)
    assert paired_loss(full, reduced).high > 0.15, "ten samples of half the weight are not a thousand"


def test_a_loss_needs_the_same_samples():
    for first, second in (({}, {}), ({"a": {"1": 1.0}}, {"a": {"2": 1.0}})):
        with pytest.raises(ValueError, match="paired_loss: both need outcomes of the same samples"):
            paired_loss(first, second)


@pytest.mark.parametrize(("samples", "worse", "better"), [(40, 0.1, 0.05), (100, 0.05, 0.03), (300, 0.1, 0.1), (300, 0.02, 0.0)])
def test_the_interval_of_a_loss_holds_the_truth_as_often_as_it_says(samples, worse, better):
    dice = np.random.default_rng(0)
    inside = below = 0
    for _ in range(400):
        draw = dice.random(samples)
        full = {"a": {str(i): float(not worse <= d < worse + better) for i, d in enumerate(draw)}}
        reduced = {"a": {str(i): float(d >= worse) for i, d in enumerate(draw)}}
        found = paired_loss(full, reduced)
        inside += found.low <= worse - better <= found.high
        below += worse - better <= found.high
    assert inside >= 0.93 * 400
    assert below >= 0.955 * 400
