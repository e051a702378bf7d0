"""How many operators a selection launches: a ceiling for every method, and as many for a batch of any size."""

from dataclasses import replace

import pytest
import torch

from tests.test_contract import NAMES, home, method_of, subject_of
from tests.tiny_models import ROWS, batch_of, model_of
from vtr.bench.launches import Launches, launches
from vtr.ops.blocks import all_at_once
from vtr.registry import method_class
from vtr.testing import given

CROPS = "llava_next"
"""Its images have crops, padding and different numbers of tokens."""
CEILINGS: dict[str, tuple[int, int | None]] = {
    "cdpruner": (139, 141),
    "centerclip": (449, 433),
    "corematching": (101, 101),
    "dart": (144, 144),
    "divprune": (50, 50),
    "dycoke": (137, None),
    "evs": (60, None),
    "expedit": (231, 231),
    "fastervlm": (4, 5),
    "fastv": (4, 7),
    "fastvid": (349, None),
    "flashvid": (450, None),
    "flowcut": (70, 213),
    "frames": (67, None),
    "globalcom2": (5, 109),
    "hiprune": (7, 8),
    "hired": (4, 61),
    "holitom": (412, None),
    "holov": (66, 69),
    "mmtok": (101, 69),
    "none": (1, 1),
    "pool": (197, 197),
    "prumerge": (94, 98),
    "prumerge_plus": (122, 126),
    "prunesid": (244, 234),
    "prunevid": (433, None),
    "pyramiddrop": (129, 138),
    "quota": (267, None),
    "random": (58, 61),
    "resize": (0, 0),
    "scope": (83, 47),
    "script": (181, 183),
    "shortv": (0, 0),
    "sparsevlm": (454, 454),
    "sparsevlm_plus": (182, 182),
    "todre": (70, 70),
    "tokencorr": (142, 149),
    "tome": (169, 295),
    "transprune": (437, 437),
    "uniform": (23, 23),
    "v2drop": (18, 27),
    "vcast": (118, None),
    "vidcom2": (189, None),
    "visionzip": (68, 9),
    "vispruner": (47, 232),
    "vscan": (140, 147),
}
"""All selections of one prefill of a tiny model, 7 tokens of an image left: on the method's home, and on `CROPS` where it works there. A change that
needs more has to say why; one that needs fewer lowers the number."""
COUNTED_ON = "2.14"
"""Release of torch that the ceilings belong to."""
GROWING: dict[str, str] = {}
"""Methods that launch more for a larger batch, and why."""


def counted(monkeypatch: pytest.MonkeyPatch, name: str, kind: str, times: int) -> int:
    """Operators that all selections of one prefill launch, for a batch of `times` the same prompts."""
    seen = Launches()
    method, cls = method_of(name, 7, kind), method_class(name)
    steps = cls.steps

    def watched(select):
        def run(view):
            with seen, all_at_once():
                return select(view)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(
            cls,
            "steps",
            lambda self, geometry: tuple(s if s.select is None else replace(s, select=watched(s.select)) for s in steps(self, geometry)),
        )
        batch = batch_of(kind, [*ROWS] * times)
        with given.reduced(model_of(kind), method):
            model_of(kind)(**batch.inputs)
            seen.by_name.clear()
            model_of(kind)(**batch.inputs)
    assert not seen.waits
    return seen.count


def test_the_counter_counts_what_computes():
    some = torch.rand(3, 4)
    assert launches(lambda: some.T.reshape(2, 6)[0]) == (1, 0), "the copy; the views are nothing"
    assert launches(lambda: torch.empty(3).fill_(1) + some[0, :3]) == (2, 0)
    assert launches(lambda: some.sum().item()) == (1, 1)


def test_every_method_has_a_ceiling():
    assert sorted(CEILINGS) == NAMES
    assert GROWING.keys() <= CEILINGS.keys()


@pytest.mark.parametrize("place", [pytest.param(0, id="home"), pytest.param(1, id="crops", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*keep.*")
@torch.no_grad()
def test_a_selection_launches_no_more_than_it_did(monkeypatch, name, place):
    kind = (home(name), CROPS)[place]
    most = CEILINGS[name][place]
    assert (most is not None) == (place == 0 or subject_of(name).works_on(kind))
    if most is None:
        return
    count = counted(monkeypatch, name, kind, 1)
    if torch.__version__.startswith(COUNTED_ON):  # another release may take an operator apart in other ways
        assert count <= most, f"{name}: {count} operators, at most {most} before"
        assert count >= 0.9 * most, f"{name}: {count} operators are fewer than the {most} of the table; lower it"
    if name not in GROWING:
        assert counted(monkeypatch, name, kind, 3) == count, "more for a larger batch"
