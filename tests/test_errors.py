"""What cannot be done is refused, with a message that says what to do instead: every row of the host design that has a host."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import vtr
from tests import dense_models, probes, tiny_models
from tests.probes import EveryNth, Observe, TowerTop
from tests.tiny_models import LLM, batch_of, build, model_of
from vtr import Boundary, Remove, Selection, Signal, VtrError

pytestmark = pytest.mark.usefixtures("no_gradients")

HALF = EveryNth(stride=2)
REPLACED = r"the model's layers were replaced since vtr\.apply; remove\(\) the reduction and apply it again"


@pytest.fixture
def model():
    return model_of("llava")


def refuse(model, *arguments, **settings):
    """`vtr.apply` that must fail; if it does not, the model is set free again for the next test."""
    vtr.apply(model, *arguments, **settings).remove()


# -- models


def test_unknown_model_type_names_the_known_ones():
    with pytest.raises(VtrError, match=r"no host for 'llama'; known: .*llava.*@vtr\.register_host\('llama'\)"):
        refuse(LlamaForCausalLM(LlamaConfig(**LLM)), "random", keep=4)


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch module, got str; load it with from_pretrained"):
        refuse("llava-hf/llava-1.5-7b-hf", "random", keep=4)


def test_two_plans_on_one_model_are_refused(model):
    with vtr.reduced(model, HALF), pytest.raises(VtrError, match=r"already.*one plan|already.*list|compose"):
        refuse(model, EveryNth(stride=3))
    vtr.apply(model, HALF).remove()  # free again


def test_removing_twice_is_harmless(model):
    before = tiny_models.snapshot(model)
    reduction = vtr.apply(model, HALF)
    reduction.remove()
    reduction.remove()
    assert tiny_models.snapshot(model) == before


def test_a_layer_replaced_under_a_reduction_is_refused():
    model, batch = build("llava"), batch_of("llava")
    layers = model.model.language_model.layers
    with vtr.reduced(model, [HALF, EveryNth(stage="prefill", layer=2)]), pytest.raises(VtrError, match=REPLACED):
        layers[2] = copy.deepcopy(model_of("llava").model.language_model.layers[2])
        model(**batch.inputs)


@pytest.mark.parametrize("implementation", ["paged|sdpa", "paged|eager"])
def test_paged_attention_is_refused(implementation):
    model = build("llava")
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            module.config._attn_implementation_internal = implementation
    with pytest.raises(VtrError, match=r"paged.*'sdpa'"):
        refuse(model, HALF)


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_a_feature_strategy_that_breaks_the_grid_is_refused(strategy):
    model = build("llava" if strategy == "full" else "llava_siglip", vision_feature_select_strategy=strategy)
    with pytest.raises(VtrError, match=f"vision_feature_select_strategy='{strategy}'.*use '"):
        refuse(model, HALF)


# -- names, settings, plans


def test_unknown_method_names_the_closest(model):
    with pytest.raises(ValueError, match=r"unknown method 'fast-v'; did you mean 'fastv'"):
        refuse(model, "fast-v", keep=4)
    with pytest.raises(ValueError, match=r"did you mean '\w+', '\w+' or '\w+'\?"):
        vtr.create_method("nothing_like_it")


def test_unknown_setting_names_the_closest(model):
    with pytest.raises(ValueError, match=r"fastv: unknown setting 'layers'; did you mean 'layer'"):
        refuse(model, "fastv", layers=2)


def test_settings_beside_an_instance_or_a_list_are_refused(model):
    with pytest.raises(ValueError, match=r"settings.*keep"):
        refuse(model, HALF, keep=4)
    with pytest.raises(ValueError, match=r"settings.*keep"):
        refuse(model, [HALF], keep=4)


@pytest.mark.parametrize("method", [None, 7, [], ["fastv"], vtr.Method])
def test_a_method_is_a_name_an_instance_or_a_list(model, method):
    with pytest.raises(TypeError, match=r"method must be a name, a method or a non-empty list of methods, got"):
        refuse(model, method)


@pytest.mark.parametrize(("settings", "message"), [({"position_ids": "reset"}, "position_ids"), ({"newlines": "some"}, "newlines")])
def test_options_have_named_values(settings, message):
    with pytest.raises(ValueError, match=rf"random: {message} must be .* got '"):
        vtr.create_method("random", keep=4, **settings)


# -- budgets


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep": 4, "keep_ratio": 0.5}, ValueError, r"exactly one of keep, keep_ratio, average_keep, got keep=4, keep_ratio=0\.5"),
        ({"keep": 4, "average_keep": 9.0}, ValueError, "exactly one of"),
        ({"keep": 0}, ValueError, r"keep must be at least 1, got 0; method 'none'"),
        ({"keep": -3}, ValueError, r"keep must be at least 1, got -3"),
        ({"keep": 4.0}, TypeError, r"keep must be an integer, got 4\.0"),
        ({"keep": True}, TypeError, r"keep must be an integer, got True"),
        ({"keep": "4"}, TypeError, r"keep must be an integer, got '4'"),
        ({"keep_ratio": 0.0}, ValueError, r"keep_ratio must be in \(0, 1\], got 0\.0"),
        ({"keep_ratio": 1.5}, ValueError, r"keep_ratio must be in \(0, 1\], got 1\.5"),
        ({"keep_ratio": "half"}, TypeError, r"keep_ratio must be a number, got 'half'"),
        ({"average_keep": -1.0}, ValueError, r"average_keep must be above 0, got -1\.0"),
    ],
)
def test_budgets_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        vtr.create_method("random", **settings)


def test_a_method_without_a_budget_takes_none():
    with pytest.raises(ValueError, match=r"none: has no budget, got keep=4; leave it out"):
        vtr.create_method("none", keep=4)


@pytest.mark.parametrize(("kind", "most"), [("llava", 36), ("llava_next", 180)])
def test_keep_above_what_the_checkpoint_can_produce(kind, most):
    with pytest.raises(ValueError, match=rf"random: keep={most + 1} is above the {most} visual tokens.*keep fewer"):
        refuse(model_of(kind), "random", keep=most + 1)


def test_keep_above_one_image_keeps_it_whole_with_one_warning():
    model, batch = model_of("llava_next"), batch_of("llava_next")  # images of 108, 180 and 108 tokens
    with vtr.reduced(model, "random", keep=150) as reduction:
        with pytest.warns(UserWarning, match="150") as caught:
            model(**batch.inputs)
            model(**batch.inputs)
        assert len([w for w in caught if "150" in str(w.message)]) == 1
        images = reduction.report().to_dict()["images"]
    assert [len(image["retained"]) for image in images] == [108, 150, 108]


def test_a_later_budget_that_can_remove_nothing_is_refused(model):
    plan = [vtr.create_method("random", keep=8), vtr.create_method("fastv", keep=8)]
    with pytest.raises(ValueError, match=r"fastv: keep=8 removes nothing, 8 tokens are left"):
        refuse(model, plan)
    vtr.apply(model, [plan[0], vtr.create_method("fastv", keep=7)]).remove()


def test_an_average_that_prefill_cannot_reach(model):
    # two of five layers run in full: at least (2 * 36 + 3 * 1) / 5 = 15 on average
    with pytest.raises(ValueError, match=r"fastv: average_keep=10.* at least 15\.0 .*layer"):
        refuse(model, "fastv", average_keep=10)
    with pytest.raises(ValueError, match=r"average_keep=40"):
        refuse(model, "fastv", average_keep=40)


@pytest.mark.parametrize(("wanted", "keep"), [(15.0, 1), (20.0, 9), (36.0, 36), (18.4, 7), (18.0, 6)])
def test_an_average_is_solved_to_the_nearest_token(model, wanted, keep):
    with vtr.reduced(model, "fastv", average_keep=wanted) as reduction:
        model(**batch_of("llava").inputs)
    told = reduction.report().to_dict()
    assert {len(image["retained"]) for image in told["images"]} == {keep}
    assert abs(told["average_keep"] - wanted) < 1


@pytest.mark.parametrize(
    ("names", "average"),
    [(("divprune", "fastv"), 15.0), (("tome", "dart"), 16.0), (("fastv", "divprune"), 13.0)],
)
def test_an_average_in_a_plan_counts_what_the_others_leave(model, names, average):
    entering = 20
    averaged = [name for name in names if name in ("fastv", "dart")]
    plan = [vtr.create_method(name, **({"average_keep": average} if name in averaged else {"keep": entering})) for name in names]
    with vtr.reduced(model, plan) as reduction:
        model(**batch_of("llava").inputs)
    told = reduction.report().to_dict()
    assert abs(told["average_keep"] - average) < 1


def test_an_average_in_a_plan_is_out_of_reach_by_what_enters(model):
    # 20 tokens enter and two of five layers run on them: at least (2 * 20 + 3 * 1) / 5 = 8.6
    plan = [vtr.create_method("divprune", keep=20), vtr.create_method("fastv", average_keep=7)]
    with pytest.raises(
        ValueError, match=r"fastv: average_keep=7 .* at least 8\.6 and at most 20; ask for more, or remove at layer 1 or before"
    ):
        refuse(model, plan)


def test_one_method_of_a_plan_has_the_average(model):
    plan = [vtr.create_method("divprune", average_keep=20), vtr.create_method("fastv", average_keep=15)]
    with pytest.raises(ValueError, match=r"one method can have it, got divprune and fastv"):
        refuse(model, plan)


def test_budgets_of_a_plan_are_compared_in_model_order(model):
    vtr.apply(model, [vtr.create_method("fastv", keep=8), vtr.create_method("divprune", keep=20)]).remove()
    with pytest.raises(ValueError, match=r"fastv: keep=20 removes nothing, 8 tokens are left by the methods that act before it"):
        refuse(model, [vtr.create_method("fastv", keep=20), vtr.create_method("divprune", keep=8)])


# -- layers and signals


@pytest.mark.parametrize("layer", [5, 16, -1])
def test_an_llm_layer_out_of_range_names_both(model, layer):
    with pytest.raises(ValueError, match=rf"layer.*(0 to 4.*5 layers, got {layer}|5 layers)"):
        refuse(model, EveryNth(stage="prefill", layer=layer))


def test_a_method_names_the_papers_layer_when_out_of_range(model):
    with pytest.raises(ValueError, match=r"fastv: layer 16 .*K = 16.*5 layers"):
        refuse(model, "fastv", layer=16)


def test_a_tower_layer_behind_the_features_names_both(model):
    with pytest.raises(ValueError, match=r"tower layer 3 must be 0 to 2"):
        refuse(model, TowerTop(layer=3))


def test_multi_layer_features_that_reach_before_the_removal_name_both_layers():
    model = build("llava", vision_feature_layer=[-4, -2])  # outputs of layers 0 and 2
    with pytest.raises(ValueError, match=r"tower layer 2 must be 0 to 0.*vision_feature_layer reads layers 0, 2"):
        refuse(model, TowerTop(layer=2))


def test_a_signal_from_a_layer_not_yet_run_is_refused(model):
    with pytest.raises(ValueError, match=r"signal rows of LLM layer 3 is not known at layer 2; layers 0 to 1 are"):
        refuse(model, Observe(stage="prefill", layer=2, signals=(Signal("rows", layer=3),)))
    with pytest.raises(VtrError, match=r"LLM layer is not known at the boundary"):
        refuse(model, Observe(signals=(Signal("rows", layer=0),)))


def test_a_cls_signal_without_cls_token_is_refused():
    with pytest.raises(VtrError, match=r"needs the CLS token, but the tower of 'llava' has none"):
        refuse(model_of("llava_siglip"), Observe(stage="tower", layer=2, signals=(Signal("cls_row"),)))


def test_an_action_that_the_host_does_not_do_there_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Elsewhere(probes.Probe):
        def steps(self, geometry):
            return (Remove(Boundary(), self.select),)

    with pytest.raises(VtrError, match=r"probe: host '.*' does not do action 'remove' at stage 'boundary'"):
        refuse(dense_models.model_of("timm"), Elsewhere())


@dataclass(frozen=True, kw_only=True)
class Answers(probes.Probe):
    """Answers whatever the test says."""

    answer: Any = None

    def select(self, view: vtr.View) -> Any:
        return self.answer(view)


@pytest.mark.parametrize(
    "answer",
    [
        lambda view: None,
        lambda view: view.real,
        lambda view: Selection(keep=view.real[:, :5]),
        lambda view: Selection(keep=view.real.float()),
    ],
    ids=["nothing", "a tensor", "a wrong shape", "a wrong dtype"],
)
def test_a_selection_that_is_none_is_refused(model, answer):
    with vtr.reduced(model, Answers(answer=answer)), pytest.raises((ValueError, TypeError, VtrError), match="probe"):
        model(**batch_of("llava").inputs)


def test_a_selection_gives_a_mask_or_an_index():
    with pytest.raises(ValueError, match="keep or index, exactly one"):
        Selection()
