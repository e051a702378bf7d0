"""Intervals against known values and against their own claims."""

import pytest

from vtr.eval.stats import accuracy, macro_accuracy, paired_difference, wilson


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
