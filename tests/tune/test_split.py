"""Samples of a tuning: the halves and slices never overlap, and a limit that can show nothing is refused."""

from dataclasses import dataclass

import pytest

from vtr.eval.tasks import Task
from vtr.tune.split import FEW, SLICES, make_split
from vtr.tune.target import Target

FAST = Target("speed", 1.5)


@dataclass(frozen=True)
class Sample:
    id: str
    family: str


def task(name="made", frames=None, **families):
    def samples(limit):
        return [Sample(f"{f}{i}", f) for f, count in families.items() for i in range(min(count, limit or count))]

    return Task(name, "1", "0", tuple(families), samples, lambda said, answer: said == answer, 4, frames=frames)


def ids(split, half, part):
    return [sample.id for cell in split.cells(None, None, half, part).values() for sample in cell.task.samples(cell.limit)]


def test_every_sample_is_in_one_slice_of_one_half():
    split = make_split([task(a=103, b=40, c=5)], None, FAST)
    found = [i for half in ("search", "held-out") for part in SLICES for i in ids(split, half, part)]
    assert len(found) == len(set(found)) == 148
    assert ids(split, "search", (0, 8))[:51] == [f"a{i}" for i in range(51)], "the first half, whatever was run first"
    assert {i[0] for i in ids(split, "held-out", (0, 8))} == {"a", "b", "c"}


def test_slices_are_cells_of_their_own_that_know_their_samples():
    split = make_split([task(a=100), task("other", a=30)], 50, FAST)
    cells = [cell for half in ("search", "held-out") for part in SLICES for cell in split.cells(None, None, half, part).values()]
    assert len({cell.task.name for cell in cells}) == len(cells)
    assert {cell.limit for cell in cells} == {50}
    assert split.sizes == {"made/a": 50, "other/a": 30} and split.weights == {"made/a": 0.5, "other/a": 0.5}


def test_the_first_stage_has_some_samples_of_every_family_and_the_last_all():
    small, large = make_split([task(a=100, b=6)], None, FAST), make_split([task(a=400, b=400)], 400, FAST)
    assert large.stages == 4 and small.stages < 4
    for split in (small, large):
        first = [i for part in split.slices(0) for i in ids(split, "search", part)]
        assert {i[0] for i in first} == {"a", "b"}
        assert len(first) >= FEW or split.stages == 1
        assert split.slices(split.stages - 1) == list(SLICES)


def test_a_loss_gets_as_many_samples_as_it_needs():
    assert make_split([task(a=5000)], None, Target("loss", 0.01)).held_out >= 2 * 381
    assert make_split([task(a=5000)], None, FAST).held_out == 100
    with pytest.raises(ValueError, match="shown by 381 held-out samples or more.*and 700 samples.* hold out 350; give --limit 762 or more"):
        make_split([task(a=5000)], 700, Target("loss", 0.01))
    with pytest.raises(ValueError, match="and 300 samples of each family hold out 150; take a larger task, or ask for less"):
        make_split([task(a=300)], None, Target("loss", 0.01))


def test_what_cannot_be_split_or_timed_is_refused():
    with pytest.raises(ValueError, match="--limit: half of the samples .* got 3"):
        make_split([task(a=9)], 3, FAST)
    with pytest.raises(ValueError, match="every family needs at least 4 samples, made/b has 3"):
        make_split([task(a=9, b=3)], None, FAST)
    with pytest.raises(ValueError, match="tune times prompts with images, and made has videos"):
        make_split([task(frames=8, a=9)], None, FAST)
