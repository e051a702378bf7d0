"""The kit for authors elsewhere: what it imports, and that it sees what is wrong with a method or an engine."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import vtr
from tests import reference, tiny_models
from tests.marks import quick_first
from vtr.engine import tokens as sequence
from vtr.ops.topk import topk_mask
from vtr.testing import check_host, check_method, oracles
from vtr.testing.watching import images_of
from vtr.types import View


@pytest.mark.slow
def test_the_kit_needs_neither_pytest_nor_model_libraries_to_be_imported():
    code = (
        "import sys, vtr.testing; from vtr.testing import check_method, check_host; import vtr.testing.oracles, vtr.testing.probes; "
        "print(sorted({'pytest', 'timm', 'transformers', 'open_clip', 'hypothesis'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@dataclass(frozen=True, kw_only=True)
class Loud(vtr.ScoreMethod):
    """Keeps the loudest tokens."""

    card = vtr.Card(title="keep the loudest", paper="none, a test", ours=True)
    stages = ("boundary",)
    default_budget = vtr.Budget(keep_ratio=0.25)
    name = "loud"

    def where(self, geometry):
        return vtr.Boundary()

    def score(self, view):
        return view.tokens.float().norm(dim=-1)


class Chance(Loud):
    def score(self, view):
        return torch.rand(view.real.shape)


class Few(Loud):
    """Keeps one token less than asked, and says that it decides itself."""

    def steps(self, geometry):
        return (vtr.Remove(vtr.Boundary(), self.less, counted=False),)

    def less(self, view):
        return vtr.Selection(keep=topk_mask(self.score(view), view.real, (view.real.sum(1) - 1).clamp(max=6)))


class Elsewhere(Loud):
    stages = ("prefill",)


class Deaf(Loud):
    """Says that it needs CLS, and does not."""

    card = vtr.Card(title="x", paper="x", ours=True, needs_cls=True)


def failed(results) -> set[str]:
    return {result.check for result in results if not result.passed}


@pytest.mark.slow
def test_an_unregistered_class_and_an_instance_pass():
    results = check_method(Loud, ["llava"])
    assert not failed(results) and {result.who for result in results} == {"loud"}
    assert not failed(check_method(Loud(keep=3, position_ids="renumber"), ["llava_next"]))


@pytest.mark.parametrize(
    ("method", "check"),
    quick_first(
        [
            (Few, "retained is what was asked for, keep=7"),
            (Chance, "same settings, same result"),
            (Elsewhere, "stages are where the steps are"),
            (Deaf, "what the card needs is refused elsewhere"),
        ]
    ),
)
def test_a_broken_promise_is_found(method, check):
    results = check_method(method, ["llava"])
    assert check in failed(results)
    assert all(result.error.startswith("loud: ") for result in results if not result.passed)


def test_broken_promises_are_raised_together_where_asked_for():
    with pytest.raises(AssertionError, match="^loud: "):
        check_method(Deaf, ["llava"], raises=True)


def test_a_wrong_engine_is_found(monkeypatch):
    real = sequence.compaction

    def off_by_one(keep, width=None):
        index, valid = real(keep, width)
        return index.roll(1, 1), valid

    monkeypatch.setattr(sequence, "compaction", off_by_one)
    assert "removed equals masked" in failed(check_method("divprune", ["llava"]))


def test_an_oracle_that_does_not_hold_is_a_result(monkeypatch):
    """That all hold is what docs/testing.md shows, which is executed."""
    monkeypatch.setattr(oracles, "ORACLES", {"O1": oracles.keep_all, "O99": lambda setup: 0.5})
    first, second = check_host("llava")
    assert first.passed and first.check == "O1: keeping everything is bit-identical, forward and generate"
    assert not second.passed and second.error == "llava: O99 must hold within 1e-06, got a difference of 0.5"
    with pytest.raises(ValueError, match="check_host: unknown kind 'mine'; one of llava, .* put yours into"):
        check_host("mine")


def test_a_family_of_somebody_else_is_a_class_and_an_entry(monkeypatch):
    class Wide(type(tiny_models.FAMILIES["llava"])):
        def unbuilt(self, **changes):
            return super().unbuilt(text={"hidden_size": 96, "num_attention_heads": 6}, **changes)

    monkeypatch.setitem(tiny_models.FAMILIES, "wide", Wide())
    results = check_method("fastv", ["wide"])
    assert not failed(results) and tiny_models.model_of("wide").config.text_config.hidden_size == 96


def test_rows_of_single_views_are_counted_by_image():
    view = View(**dict.fromkeys(("tokens", "real", "keep", "row", "cells", "patch", "sizes", "checksum")), counts=[], keeps=[1] * 6, most=1,
                grids=[], crop_grids=[], image_sizes=[])  # fmt: skip
    assert images_of(view) == [0, 1, 2, 3, 4, 5]
    view.only = [0, 1, 2, 0, 0, 1]
    assert images_of(view) == [0, 0, 0, 1, 2, 2]


def test_hiding_keys_from_a_layer_that_does_not_ask_is_an_error():
    with (
        pytest.raises(AssertionError, match="keys_hidden: Linear did not ask"),
        reference.keys_hidden({torch.nn.Linear(2, 2): torch.ones(1)}),
    ):
        pass
