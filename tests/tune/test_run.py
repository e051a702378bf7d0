"""A whole tuning on made-up samples: what is confirmed, in which order, and how often it is wrong."""

from types import SimpleNamespace

import numpy as np
import pytest

from vtr.eval.stats import Interval, paired_loss
from vtr.registry import create_method
from vtr.tune import run
from vtr.tune.measure import Held
from vtr.tune.search import CannotRun, Line, OutOfTime
from vtr.tune.space import Candidate, Space
from vtr.tune.target import Target

STOPS = (1, 2, 4, 8)
SAMPLES = 400


class Measurer:
    """Draws an outcome of every sample of every candidate from its true loss; an eighth of the samples is a stage's first part."""

    def __init__(self, true, speeds, dice, most=10**9):
        self.true, self.most, self.dice, self.times = true, most, dice, speeds
        self.split = SimpleNamespace(stages=4, tasks=())
        self.losses, self.speeds, self.retained, self.asked = {}, {}, {None: 576.0}, []
        self.until, self.accuracy, self._drawn = 0.0, 0.9, {}

    def _draw(self, candidate, half):
        if (candidate, half) not in self._drawn:
            if len(self._drawn) >= self.most:
                raise OutOfTime
            self._drawn[candidate, half] = self.dice.random(SAMPLES)
        lost = self.true[candidate]
        return [(float(not d > 0.995), float(d >= lost + 0.005)) for d in self._drawn[candidate, half]]  # 0.5 % change either way

    def _loss(self, candidate, half, count):
        drawn = self._draw(candidate, half)[:count]
        full, reduced = ({"a": {str(i): pair[side] for i, pair in enumerate(drawn)}} for side in (0, 1))
        self.retained[candidate] = 64.0
        return paired_loss(full, reduced)

    def loss(self, candidate, stage):
        count = SAMPLES * STOPS[stage] // 8
        self.losses[candidate] = self._loss(candidate, "search", count), count
        return self.losses[candidate][0]

    def held_out(self, candidate):
        self.asked.append(candidate)
        return Held(self._loss(candidate, "held-out", SAMPLES), SAMPLES, 0.9)

    def speed(self, candidate, rounds=9):
        value = self.times[candidate]
        found = self.speeds[candidate] = Interval(value, 0.99 * value, 1.01 * value)
        return found

    def floor(self, keep):
        return None


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(run, "plan", lambda model, method, question: SimpleNamespace(to_dict=lambda: {"methods": [method.to_dict()]}))
    monkeypatch.setattr(run, "sketch", lambda setup: None)


def world(dice, losses, most=10**9):
    """A space of lines with these true losses, and what measures them; later candidates are faster, and so are later lines."""
    lines, true, speeds = [], {}, {}
    for number, own in enumerate(losses):
        candidates = [Candidate(f"m{number} {i}", create_method("uniform", keep=100 - i)) for i in range(len(own))]
        lines.append(Line(f"m{number}", candidates))
        true |= dict(zip(candidates, own, strict=True))
        speeds |= {one: 1.1 + 0.1 * i + 0.01 * number for i, one in enumerate(candidates)}
    return Space(lines, []), Measurer(true, speeds, dice, most)


def test_what_is_confirmed_is_made_faster_until_it_fails():
    space, measurer = world(np.random.default_rng(0), [[0, 0, 0, 0.02, 0.3, 0.4]])
    tuned = run.tune(space, Target("loss", 0.05), measurer, None, None)
    assert tuned.verdict == "met" and tuned.plan["methods"][0]["keep"] == tuned.chosen.method.keep
    assert measurer.asked == [one for one, _ in tuned.tried] and len(set(measurer.asked)) == len(measurer.asked)
    places = [int(one.label[-1]) for one in measurer.asked]
    assert places == list(range(places[0], places[0] + len(places))), "from more tokens to fewer, none left out"
    verdicts = [tuned.target.verdict(held.loss) for _, held in tuned.tried]
    assert set(verdicts[:-1]) <= {"met"}, "the first that is not shown ends it"
    assert int(tuned.chosen.label[-1]) >= 2 and measurer.true[tuned.chosen] <= 0.05
    assert [one for one in tuned.points if one.label == tuned.chosen.label], "it stands in the table"


def test_of_what_is_said_to_be_met_hardly_any_is_wrong_and_much_is_found():
    dice, said, wrong, repeats = np.random.default_rng(1), 0, 0, 50
    for _ in range(repeats):
        losses = [[0.05 * scale * 0.1 * 1.6**i for i in range(8)] for scale in dice.uniform(0.3, 3, 6)]
        space, measurer = world(dice, losses)
        tuned = run.tune(space, Target("loss", 0.05), measurer, None, None)
        said += tuned.verdict == "met"
        wrong += tuned.verdict == "met" and measurer.true[tuned.chosen] > 0.05
    assert wrong <= 0.025 * repeats
    assert said > 0.6 * repeats


def test_time_that_is_over_leaves_the_best_so_far_unconfirmed():
    space, measurer = world(np.random.default_rng(0), [[0, 0, 0.5], [0, 0.5, 0.6]], most=3)
    tuned = run.tune(space, Target("loss", 0.05), measurer, None, None)
    assert tuned.chosen is not None and tuned.verdict is None and not tuned.found.finished
    assert "time is over: its loss is not confirmed" in tuned.sentences
    assert any(line.startswith("time was over before the search was") for line in tuned.sentences)


def test_a_speed_is_confirmed_once():
    space, measurer = world(np.random.default_rng(0), [[0, 0, 0.01, 0.1], [0, 0.3, 0.4, 0.5]])
    tuned = run.tune(space, Target("speed", 1.25), measurer, None, None)
    assert tuned.chosen.label == "m0 2" and tuned.verdict == "met" and measurer.asked == [tuned.chosen]


def test_if_none_can_run_or_none_is_fast_enough_that_is_said(monkeypatch):
    space, measurer = world(np.random.default_rng(0), [[0, 0.1]])
    monkeypatch.setattr(run, "forecast", lambda setup, cell: None)
    monkeypatch.setattr(run, "final_keep", lambda setup, cell, method: 99)
    monkeypatch.setattr(run, "Cell", lambda method, task: SimpleNamespace(methods=(method,)))
    measurer.split.tasks = (None,)
    with pytest.raises(ValueError, match="3x is out of reach: the fastest candidate, m0 1, is 1.20x; ask for less"):
        run.tune(space, Target("speed", 3), measurer, SimpleNamespace(model="made"), None)

    def fail(candidate, *_):
        raise CannotRun("no such kernel")

    space, measurer = world(np.random.default_rng(0), [[0, 0.1]])
    monkeypatch.setattr(measurer, "loss", fail)
    with pytest.raises(ValueError, match="none can be measured on made: m0: no such kernel"):
        run.tune(space, Target("loss", 0.05), measurer, SimpleNamespace(model="made"), None)
