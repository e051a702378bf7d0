"""Plans: what a method gives as steps, and budgets of several methods that have to fit together."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

import vtr
from tests import probes, tiny_models
from tests.tiny_models import model_of
from vtr import Boundary, Layer, Observe, Remove
from vtr.types.signals import LAST, attention

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def model():
    return model_of("llava")


def refuse(model, *arguments, **settings):
    """`vtr.apply` that must fail; if it does not, the model is set free again for the next test."""
    vtr.apply(model, *arguments, **settings).remove()


def test_a_list_of_names_says_how_a_plan_is_made(model):
    with pytest.raises(
        TypeError, match=r"non-empty list of methods, got \['divprune', 'fastv'\].*vtr\.create_method\('divprune', \.\.\.\)"
    ):
        refuse(model, ["divprune", "fastv"])


@pytest.mark.parametrize("given", ["a step", None, 3, ("no step",), [Remove(Boundary(), lambda view: None), None]])
def test_steps_that_are_no_steps_name_the_method(model, given):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(probes.Probe):
        def steps(self, geometry):
            return Remove(Boundary(), self.select) if given == "a step" else given

    with pytest.raises(TypeError, match=r"probe: steps must return a tuple of vtr\.Step, got .*; return \(step,\) for one step"):
        refuse(model, Wrong())


@pytest.mark.parametrize(
    ("kind", "first", "second", "message"),
    [
        (
            "llava",
            {"keep_ratio": 0.5},
            {"keep_ratio": 0.5},
            r"keep_ratio=0\.5 removes nothing, 18 tokens .* \(a ratio is of the image's original",
        ),
        (
            "llava",
            {"keep": 9},
            {"keep_ratio": 0.25},
            r"keep_ratio=0\.25 removes nothing, 9 tokens are left by the methods that act before it",
        ),
        ("llava", {"keep": 9}, {}, r"its default keep_ratio=0\.\d+ removes nothing, 9 tokens"),
        ("llava", {"keep_ratio": 0.25}, {"keep": 9}, r"keep=9 removes nothing, 9 tokens"),
        ("llava", {"keep": 20}, {"average_keep": 20.0}, r"average_keep=20 removes nothing, 20 tokens"),
        ("llava", {}, {"keep": 12}, r"keep=12 removes nothing, 12 tokens"),
        ("llava_next", {"keep": 20}, {"keep_ratio": 0.6}, r"keep_ratio=0\.6 removes nothing, 20 tokens"),
        ("llava_next", {"keep_ratio": 0.2}, {"keep": 40}, r"keep=40 removes nothing, 36 tokens"),
    ],
)
def test_a_method_that_could_remove_nothing_is_refused_in_every_form(kind, first, second, message):
    plan = [vtr.create_method("uniform", **first), vtr.create_method("fastv", layer=1, **second)]
    with pytest.raises(ValueError, match=rf"^fastv: {message}.*lower it or leave fastv out$"):
        refuse(model_of(kind), plan)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("llava", {"keep_ratio": 0.5}, {"keep_ratio": 0.49}),  # of 36: 18, then 18
        ("llava", {"keep": 18}, {"keep_ratio": 0.45}),
        ("llava", {"keep_ratio": 1.0}, {"keep_ratio": 0.5}),
        ("llava_next", {"keep": 20}, {"keep_ratio": 0.5}),  # 18 of a small image's 36, nothing of a large one's 180
        ("llava_next", {"keep_ratio": 0.5}, {"keep": 20}),
    ],
)
def test_a_method_that_can_remove_something_is_accepted(kind, first, second):
    plan = [vtr.create_method("uniform", **first), vtr.create_method("fastv", layer=1, **second)]
    if second == {"keep_ratio": 0.49}:
        with pytest.raises(ValueError, match=r"keep_ratio=0\.49 removes nothing, 18 tokens"):
            refuse(model_of(kind), plan)
    else:
        refuse(model_of(kind), plan)


def test_a_plan_does_not_go_below_eight_tokens_to_meet_a_mean(model):
    plan = [vtr.create_method("divprune", keep=20), vtr.create_method("fastv", average_keep=12)]
    with pytest.raises(
        ValueError, match=r"fastv: average_keep=12 is out of reach .* leave 7 at the end, and goes down to 8, an average of 12\.8; ask for"
    ):
        refuse(model, plan)
    refuse(model, [plan[0], vtr.create_method("fastv", average_keep=12.8)])
    refuse(model, "fastv", average_keep=16)  # 3 tokens, by one method that was asked for them


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_a_removal_in_front_of_the_first_layer_is_one_at_the_boundary(kind):
    """The model has made its masks for the longer prompt by then."""
    found, batch = [], tiny_models.batch_of(kind)
    for where in ({"stage": "boundary"}, {"stage": "prefill", "layer": 0}):
        small = tiny_models.model_of(kind)
        with torch.no_grad(), vtr.reduced(small, [probes.EveryNth(**where)]):
            found.append(small(**batch.inputs).logits)
    assert torch.allclose(*found, atol=1e-5)


def test_a_step_reads_attention_of_any_earlier_layer(model):
    """What was seen at a layer is kept until its last reader."""
    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Reads(probes.Probe):
        def steps(self, geometry):
            return tuple(Observe(Layer(at), partial(self.note, at), needs=(attention(0, queries=LAST),)) for at in (1, 3))

        def note(self, at, view):
            (seen[at],) = view.signals.values()

    batch = tiny_models.batch_of("llava")
    with torch.no_grad(), vtr.reduced(tiny_models.model_of("llava"), [Reads()]):
        tiny_models.model_of("llava")(**batch.inputs)
    assert torch.equal(seen[1], seen[3])
