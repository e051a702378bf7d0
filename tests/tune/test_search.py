"""The search with a made-up evaluator: what it chooses, what it does not measure, and that a stopped one loses nothing."""

import pytest

from vtr.eval.stats import Interval
from vtr.tune.search import CannotRun, Line, OutOfTime, boundary, search
from vtr.tune.target import ROOM, Target

STAGES = 4


class Made:
    """An evaluator of candidates `(line, place)` with known losses and speeds; remembers what was measured, as the real one does."""

    def __init__(self, losses, speeds, half=0.02, most=10**9, broken=()):
        self.losses, self.speeds, self.half, self.most, self.broken = losses, speeds, half, most, broken
        self.seen = {}

    def _measured(self, key, value, half):
        if key not in self.seen:
            if len(self.seen) >= self.most:
                raise OutOfTime
            self.seen[key] = Interval(value, value - half, value + half)
        return self.seen[key]

    def loss(self, candidate, stage):
        name, place = candidate
        if name in self.broken:
            raise CannotRun(f"{name} is broken")
        for earlier in range(stage + 1):  # slices of samples
            self._measured(("slice", candidate, earlier), 0, 0)
        return self._measured(("loss", candidate, stage), self.losses[name][place], self.half / 2**stage)

    def speed(self, candidate):
        name, place = candidate
        return self._measured(("speed", candidate), self.speeds[name][place], 0.05)

    def lines(self):
        return [Line(name, [(name, i) for i in range(len(losses))]) for name, losses in self.losses.items()]


def made(**options):
    losses = {
        "good": [0, 0, 0.001, 0.004, 0.006, 0.02, 0.05, 0.1],
        "bad": [0, 0.006, 0.03, 0.05, 0.1, 0.2, 0.3, 0.4],
        "slow": [0, 0, 0, 0.002, 0.005, 0.01, 0.03, 0.05],
        "worst": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
    }
    steps = [1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3]
    speeds = {name: [1 + (s - 1) * (0.2 if name == "slow" else 1) for s in steps] for name in losses}
    return Made(losses, speeds, **options)


def chosen(found):
    return None if found.chosen is None else found.chosen.candidate


def test_for_a_loss_the_fastest_within_it_is_chosen_by_its_whole_interval():
    world = made()
    found = search(world.lines(), Target("loss", 0.01), world, STAGES)
    assert found.finished and found.level == ROOM
    assert chosen(found) == ("good", 3)  # 0.004 + 1.65 x 0.0025 is within 0.01; 0.006 is not
    wide = made(half=0.05)
    found = search(wide.lines(), Target("loss", 0.01), wide, STAGES)
    assert chosen(found) == ("good", 2) and found.level == 1  # 0.001 + 0.00625; there is room nowhere


def test_without_a_whole_interval_the_estimate_decides_and_that_is_said():
    world = made(half=1.0)
    found = search(world.lines(), Target("loss", 0.01), world, STAGES)
    assert chosen(found) == ("good", 4) and found.level == 0


def test_for_a_speed_the_least_loss_of_those_that_are_fast_enough_is_chosen():
    world = made()
    found = search(world.lines(), Target("speed", 1.5), world, STAGES)
    assert chosen(found) == ("good", 4) and found.level == 1  # 1.5 - 0.05 is not enough
    assert "slow" in found.fastest and next(line for line in found.lines if line.name == "slow").why_not.startswith(
        "not fast enough: 1.26x"
    )
    assert not any(kind == "loss" and candidate[0] == "slow" for kind, candidate, *_ in world.seen), "too slow: no sample is spent on it"


def test_lines_are_bisected_and_most_of_them_end_early():
    world = made()
    search(world.lines(), Target("loss", 0.01), world, STAGES)
    slices = [key for key in world.seen if key[0] == "slice"]
    assert sum(2 ** max(stage - 1, 0) for *_, stage in slices) < 0.6 * 4 * 8 * 2 ** (STAGES - 1), "far from a full grid"
    assert {stage for _, (name, _), stage in slices if name == "worst"} == {0}


def test_none_is_chosen_where_none_is_within_the_target():
    world = made()
    world.losses = {name: [0.5] * 8 for name in world.losses}
    found = search(world.lines(), Target("loss", 0.01), world, STAGES)
    assert chosen(found) is None and found.finished
    assert all(line.candidate is None for line in found.lines if line.stage == STAGES - 1)


def test_what_cannot_run_is_out_and_the_others_go_on():
    world = made(broken=("good",))
    found = search(world.lines(), Target("loss", 0.01), world, STAGES)
    assert chosen(found) == ("slow", 4)
    assert next(line for line in found.lines if line.name == "good").why_not == "good is broken"


@pytest.mark.parametrize("target", [Target("loss", 0.01), Target("speed", 1.5)])
def test_a_search_that_is_stopped_anywhere_goes_on_and_measures_nothing_twice(target):
    whole = made()
    expected = search(whole.lines(), target, whole, STAGES)
    for most in range(len(whole.seen)):
        world = made(most=most)
        stopped = search(world.lines(), target, world, STAGES)
        assert not stopped.finished
        world.most = 10**9
        found = search(world.lines(), target, world, STAGES)
        assert chosen(found) == chosen(expected)
        assert world.seen == whole.seen


def test_the_best_so_far_is_taken_when_time_is_over():
    whole = made()
    search(whole.lines(), Target("loss", 0.01), whole, STAGES)
    late = made(most=len(whole.seen) - 3)
    found = search(late.lines(), Target("loss", 0.01), late, STAGES)
    assert chosen(found) is not None and chosen(found)[0] == "good"
    early = made(most=0)
    assert chosen(search(early.lines(), Target("loss", 0.01), early, STAGES)) is None


@pytest.mark.parametrize("count", range(1, 12))
def test_the_boundary_is_found_wherever_it_is_and_whatever_is_guessed(count):
    for last in range(-1, count):
        for guess in (None, -1, *range(count + 1)):
            asked = []

            def holds(place, last=last, asked=asked):
                asked.append(place)
                return place <= last

            assert boundary(count, holds, guess) == last
            assert len(asked) == len(set(asked)) and set(asked) <= set(range(count))
            if guess is not None and guess == last >= 0:
                assert len(asked) <= 2, "a right guess costs two questions"
