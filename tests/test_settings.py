"""Settings: numbers of numpy and torch are numbers, other types are refused in one line, and what is kept survives JSON."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

import vtr
from vtr.registry import _METHODS
from vtr.types import BUDGETS, Budget

NUMBERS = {
    "numpy int": (np.int64(9), 9),
    "numpy uint8": (np.uint8(9), 9),
    "numpy array without dimensions": (np.array(9), 9),
    "torch tensor without dimensions": (torch.tensor(9), 9),
}


class Nine:
    """Counts as an index, like the integers of other array libraries."""

    def __index__(self):
        return 9


@pytest.mark.parametrize(("given", "meant"), [*NUMBERS.values(), (Nine(), 9)], ids=[*NUMBERS, "an index"])
def test_any_integer_is_a_keep_count(given, meant):
    method = vtr.create_method("fastv", keep=given, layer=given)
    assert method == vtr.create_method("fastv", keep=meant, layer=meant)
    assert type(method.layer) is type(method.budget.keep) is int
    assert type(Budget(keep=given).keep) is int
    assert vtr.create_method(**{"name": "fastv", **json.loads(json.dumps(asdict(method)))}) == method


def test_any_float_is_a_share_and_survives_json():
    method = vtr.create_method("flowcut", keep_ratio=np.float32(0.25), history=np.float64(0.5), interval=np.int32(3))
    assert method == vtr.create_method("flowcut", keep_ratio=0.25, history=0.5, interval=3)
    assert json.loads(json.dumps(asdict(method)))["keep_ratio"] == 0.25
    assert vtr.create_method("fastv", average_keep=torch.tensor(40.0)).average_keep == 40.0


def test_numbers_inside_lists_are_plain():
    method = vtr.create_method("pyramiddrop", keep=20, layers=[np.int64(1), np.int64(2), np.int64(3)])
    assert json.loads(json.dumps(asdict(method)))["layers"] == [1, 2, 3]
    grid = vtr.create_method("pool", grid=(np.int64(3), np.int64(4))).grid
    assert grid == (3, 4) and {type(side) for side in grid} == {int}
    assert vtr.create_method("transprune", keep=20, abs_cos=np.bool_(True)).abs_cos is True


@pytest.mark.parametrize(
    ("given", "shown"),
    [(np.float64(9), r"9\.0"), (np.bool_(True), "True"), (np.array([9]), r"array\(\[9\]\)"), (torch.tensor([9]), r"tensor\(\[9\]\)")],
)
def test_what_is_no_integer_is_refused(given, shown):
    with pytest.raises(TypeError, match=f"Budget: keep must be an integer, got .*({shown})"):
        vtr.create_method("random", keep=given)
    with pytest.raises(TypeError, match=f"fastv: layer must be an integer, got .*({shown})"):
        vtr.create_method("fastv", keep=4, layer=given)


def _typed():
    """Method, setting and the word for its type, of every setting of ours with a simple annotation."""
    words = {"int": "an integer", "float": "a number", "bool": "True or False"}
    words |= {f"{kind} | None": f"{word} or None" for kind, word in words.items()}
    vtr.list_methods()
    for name, cls in sorted(_METHODS.items()):
        if cls.__module__.startswith("vtr.methods."):
            yield from ((name, f.name, words[f.type]) for f in fields(cls) if f.type in words and f.name not in BUDGETS)


@pytest.mark.parametrize(("name", "setting", "words"), list(_typed()), ids=str)
def test_every_setting_of_every_method_names_its_type(name, setting, words):
    for wrong in ("abc", [1], {}, 1 if words.startswith("True") else True):
        with pytest.raises(TypeError, match=rf"{name}: {setting} must be {words}, got "):
            vtr.create_method(name, **{setting: wrong})


@dataclass(frozen=True, kw_only=True)
class Theirs(vtr.Method):
    """A third party's method that checks nothing itself."""

    tau: float = 0.5
    rounds: int | None = None
    mode: Literal["soft", "hard"] | None = "soft"
    folder: str = "."
    odd: "NotThere" = 1  # noqa: F821
    fast: bool = False
    name: ClassVar[str] = "theirs"
    default_budget: ClassVar[Budget] = Budget(keep=4)


@pytest.fixture
def theirs(monkeypatch):
    monkeypatch.setitem(_METHODS, "theirs", Theirs)
    yield lambda **settings: vtr.create_method("theirs", keep=4, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tau": "abc"}, TypeError, "theirs: tau must be a number, got 'abc'"),
        ({"tau": True}, TypeError, "theirs: tau must be a number, got True"),
        ({"tau": ["a"]}, TypeError, r"theirs: tau must be a number, got \['a'\]"),
        ({"rounds": 2.5}, TypeError, r"theirs: rounds must be an integer or None, got 2\.5"),
        ({"mode": "weak"}, ValueError, "theirs: mode must be 'soft', 'hard' or None, got 'weak'"),
        ({"mode": 3}, TypeError, "theirs: mode must be 'soft', 'hard' or None, got 3"),
        ({"folder": 3}, TypeError, "theirs: folder must be text, got 3"),
        ({"fast": "no"}, TypeError, "theirs: fast must be True or False, got 'no'"),
    ],
)
def test_a_third_partys_settings_are_checked_by_their_annotations(theirs, settings, error, message):
    with pytest.raises(error, match=message):
        theirs(**settings)


def test_what_fits_is_taken(theirs):
    method = theirs(tau=1, rounds=None, mode="hard", folder=Path("here"), odd={"any": "thing"}, fast=True)
    assert (method.tau, method.mode, method.folder, method.odd) == (1, "hard", "here", {"any": "thing"})
    assert all(f.default is not MISSING for f in fields(method))
