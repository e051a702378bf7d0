"""Targets: their grammar, and what a measurement is said to show."""

import pytest

from vtr.eval.stats import Interval, paired_loss
from vtr.tune.measure import median_interval
from vtr.tune.target import Target, fewest_samples, loss_in_words, read_target, rounded, samples_needed, speed_in_words


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1.5x", "speed", 1.5),
        (">= 2 x", "speed", 2.0),
        ("<=1 point", "loss", 0.01),
        ("0.5 points", "loss", 0.005),
        ("≤ 2 points", "loss", 0.02),
    ],
)
def test_targets_are_read(text, kind, value):
    assert read_target(text) == Target(kind, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.5", "must be a speed factor such as '1.5x' or a loss such as '<=1 point', got '1.5'"),
        (">=1 point", "must be a speed factor"),
        ("<=1.5x", "must be a speed factor"),
        ("1x", "must be above 1x, got '1x'"),
        ("0 points", "above 0 and below 100 points"),
        ("100 points", "above 0 and below 100 points"),
        ("", "must be a speed factor"),
    ],
)
def test_other_targets_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_target(text)


def test_only_a_whole_interval_meets_or_misses_a_target():
    loss, speed = Target("loss", 0.01), Target("speed", 1.5)
    assert [loss.verdict(Interval(v, v - 0.01, v + 0.01)) for v in (-0.001, 0.005, 0.03)] == ["met", "not shown", "missed"]
    assert [speed.verdict(Interval(v, v - 0.1, v + 0.1)) for v in (1.7, 1.5, 1.3)] == ["met", "not shown", "missed"]


def test_it_is_said_how_sure_a_loss_is_and_how_many_samples_would_do():
    said = loss_in_words(Target("loss", 0.01), Interval(0.004, -0.006, 0.015), 150)
    assert said == (
        "the loss is 0.4 points, 95 % interval -0.6 to 1.5, on 150 held-out samples: not shown to be within 1 point; about 510 would be needed"
    )
    assert "within 2 points" in loss_in_words(Target("loss", 0.02), Interval(0.004, -0.006, 0.015), 150)
    assert "more than 1 point" in loss_in_words(Target("loss", 0.01), Interval(0.04, 0.02, 0.06), 150)
    assert "no remedy" in loss_in_words(Target("loss", 0.01), Interval(0.012, -0.01, 0.03), 150)
    assert loss_in_words(Target("speed", 2), Interval(0.01, 0, 0.02), 10).endswith("on 10 held-out samples")


def test_it_is_said_how_sure_a_speed_is():
    assert speed_in_words(Target("speed", 1.5), Interval(1.62, 1.55, 1.7), 25) == (
        "it is 1.62 times faster, 95 % interval 1.55 to 1.70, in 25 rounds: at least 1.5 times"
    )
    assert speed_in_words(Target("speed", 1.5), Interval(1.52, 1.45, 1.6), 25).endswith("not shown to be at least 1.5 times")
    assert speed_in_words(Target("speed", 1.5), Interval(1.2, 1.1, 1.3), 25).endswith("less than 1.5 times")
    assert speed_in_words(Target("loss", 0.1), Interval(1.02, 0.98, 1.1), 25).endswith("not shown to be faster than the full model")


def test_so_many_samples_without_a_change_just_show_a_loss():
    for lost in (0.05, 0.01):
        count = fewest_samples(lost)
        same = {"a": dict.fromkeys(map(str, range(count)), 1.0)}
        fewer = {"a": dict.fromkeys(map(str, range(count - 1)), 1.0)}
        assert paired_loss(same, same).high <= lost < paired_loss(fewer, fewer).high


def test_with_the_samples_said_to_be_needed_the_interval_is_within_the_target():
    full = {"a": {str(i): 1.0 for i in range(200)}}
    reduced = {"a": {str(i): float(i >= 2) for i in range(200)}}
    found = paired_loss(full, reduced)
    needed = samples_needed(found, 200, 0.02)
    more = {"a": {str(i): 1.0 for i in range(needed)}}
    less = {"a": {str(i): float(i >= needed // 100) for i in range(needed)}}
    assert found.high > 0.02
    assert 0.016 < paired_loss(more, less).high <= 0.02, "enough, and not far too many"


def test_counts_are_rounded_upwards_to_two_digits():
    assert [rounded(n) for n in (7, 42, 421, 1234, 1300)] == [7, 42, 430, 1300, 1300]


def test_the_interval_of_a_median_is_the_sign_tests():  # Conover, Practical Nonparametric Statistics, table of the binomial distribution
    assert median_interval(list(range(1, 10))) == (5, 2, 8)
    assert median_interval(list(range(25, 0, -1))) == (13, 8, 18)
    assert median_interval([3, 1, 2, 6, 5, 4]) == (3.5, 1, 6)
    with pytest.raises(ValueError, match="at least 6 values, got 5"):
        median_interval([1, 2, 3, 4, 5])
