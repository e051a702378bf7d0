"""Steps, signals, budgets and positions, as somebody sees them who writes a method."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest

import vtr
from tests import probes
from tests.tiny_models import batch_of, model_of
from vtr.hosts._protocol import host_of
from vtr.planning import make_plan
from vtr.types import Boundary, Budget, Geometry, Layer, Place, Remove, Signal
from vtr.types.signals import attention, cls_row, keys

pytestmark = pytest.mark.usefixtures("no_gradients")


def plan(*methods):
    return make_plan(host_of(model_of("llava")), list(methods), {})


def with_steps(make):
    @dataclass(frozen=True, kw_only=True)
    class Made(probes.Probe):
        def steps(self, geometry):
            return make(self)

    return Made()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: (Remove(Layer(2), m.select, (Signal("row"),)),), ValueError, "^probe: Signal: unknown kind 'row'; did you mean 'rows'"),
        (
            lambda m: (Remove(Layer(2), m.select, (attention("1"),)),),
            TypeError,
            "^probe: Signal: layer must be an integer or None, got '1'",
        ),
        (lambda m: (Remove(Layer("2"), m.select),), TypeError, "^probe: Layer: layer must be an integer, got '2'"),
        (lambda m: (Remove(Layer(2), m.select, keys(1)),), TypeError, "^probe: Remove: needs must be a tuple of signals, got Signal"),
        (lambda m: (Remove(Layer(2), None),), TypeError, "^probe: Remove: needs a select function of a View, got None"),
        (lambda m: Remove(Layer(2), m.select), TypeError, "^probe: steps must return a tuple of vtr.Step"),
    ],
)
def test_mistakes_in_steps_begin_with_the_name_of_the_method(make, error, message):
    with pytest.raises(error, match=message):
        plan(with_steps(make))
    with pytest.raises(ValueError, match="^Signal: unknown kind"):
        Signal("row")  # type: ignore[arg-type]


def test_a_signal_that_was_not_asked_for_is_named():
    def select(view):
        return view.signals[cls_row(1)]

    for needs, asked in (((), "no signal"), ((attention(1),), r"Signal\('rows', layer=1\)")):
        method = with_steps(lambda m, needs=needs: (Remove(Layer(2), select, needs, counted=False),))
        message = rf"^probe: reads Signal\('cls_row', layer=1, tower=True\) in select, but its step asked for {asked}; add it to the needs"
        with vtr.reduced(model_of("llava"), [method]), pytest.raises(vtr.VtrError, match=message):
            model_of("llava")(**batch_of("llava").inputs)


def test_choices_of_an_instance_are_looked_at_before_anything_runs():
    @dataclass(frozen=True, kw_only=True)
    class Chosen(probes.EveryNth):
        rule: Literal["a", "b"] = "a"

    with pytest.raises(ValueError, match="probe: rule must be 'a' or 'b', got 'c'"):
        plan(Chosen(rule="c"))  # type: ignore[arg-type]


# -- budgets


def test_a_class_with_a_default_takes_a_budget_and_one_without_may_be_adaptive():
    @dataclass(frozen=True, kw_only=True)
    class Adaptive(probes.Probe):
        takes_budget: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Inherited(Adaptive):
        pass

    assert not probes.EveryNth.takes_budget and probes.ByAttention.takes_budget
    for cls in (Adaptive, Inherited):
        assert cls.takes_budget and cls().budget is None and cls(keep=9).budget == Budget(keep=9)
    with pytest.raises(ValueError, match="probe: has no budget, got keep=9; leave it out"):
        probes.EveryNth(keep=9)


@pytest.mark.parametrize("name", ["corematching", "prumerge", "prumerge_plus", "tokencorr"])
def test_adaptive_methods_say_so_and_are_exact_with_a_budget(name):
    cls = vtr.registry.method_class(name)
    assert cls.takes_budget and cls.default_budget is None and cls.card.exact


# -- positions


def test_positions_are_the_published_ones_unless_the_host_cannot_renumber():
    host = host_of(model_of("llava"))
    for name, published in (("divprune", "renumber"), ("fastv", "keep")):
        method = vtr.create_method(name, keep=9)
        assert method.position_ids is None
        own = make_plan(host, method, {})
        assert {s.position_ids for s in own.steps} == {published} == {own.methods[0].position_ids}
        fixed = make_plan(replace(host, renumber=False), method, {})
        assert {s.position_ids for s in fixed.steps} == {"keep"} == {fixed.methods[0].position_ids}
    with pytest.raises(
        vtr.VtrError, match="divprune: position_ids='renumber' has no meaning for the rotary positions of llava; leave it out"
    ):
        make_plan(replace(host, renumber=False), vtr.create_method("divprune", position_ids="renumber"), {})


def test_reports_record_the_positions_that_were_used():
    with vtr.reduced(model_of("llava"), "divprune", keep=9) as reduction:
        model_of("llava")(**batch_of("llava").inputs)
    assert reduction.report().to_dict()["methods"][0]["position_ids"] == "renumber"


# -- methods that only score


@dataclass(frozen=True, kw_only=True)
class Norm(vtr.ScoreMethod):
    """The tokens of the largest norm."""

    layer: int | None = None

    name: ClassVar[str] = "norm"
    stages: ClassVar[tuple[vtr.types.Stage, ...]] = ("boundary", "prefill")
    default_budget: ClassVar[Budget | None] = Budget(keep=9)

    def where(self, geometry: Geometry) -> Place:
        return Boundary() if self.layer is None else Layer(self.layer)

    def score(self, view):
        return view.tokens.norm(dim=-1)


@pytest.mark.parametrize("layer", [None, 1, 3])
def test_a_method_that_only_scores_keeps_the_best(layer):
    with vtr.reduced(model_of("llava"), Norm(layer=layer)) as reduction:
        model_of("llava")(**batch_of("llava").inputs)
    assert {len(image.retained) for image in reduction.report().images} == {9}


def test_its_layer_is_checked_against_the_model():
    with pytest.raises(ValueError, match="norm: layer 5 is out of range: this LLM has 5 layers; use 0 to 4"):
        plan(Norm(layer=5))
    with pytest.raises(ValueError, match=r"fastv: layer 9 \(the paper's K = 9\) is out of range: this LLM has 5 layers; use 1 to 4"):
        plan(vtr.create_method("fastv", layer=9))
