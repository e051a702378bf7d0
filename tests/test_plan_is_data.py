"""`vtr.plan` tells what a reduction will do without doing anything: no hooks, no weights, the same refusals, the same counts as measured."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtr
from tests import dense_models
from tests.tiny_models import ONE, batch_of, model_of, snapshot
from vtr import VtrError

pytestmark = pytest.mark.usefixtures("no_gradients")

PLANS = {
    "boundary": [vtr.DivPrune(keep=9)],
    "LLM": [vtr.FastV(keep=9, layer=2)],
    "several layers": [vtr.PyramidDrop(keep=9, layers=(1, 2, 3))],
    "mean": [vtr.FastV(average_keep=20.0, layer=1)],
    "tower": [vtr.ToMe(keep=12)],
    "restored": [vtr.Expedit(alpha=1, grid=(3, 3))],
    "nothing left": [vtr.Nothing()],
    "both": [vtr.DivPrune(keep=18), vtr.FastV(keep=9, layer=1)],
}


@pytest.fixture
def model():
    return model_of("llava")


@pytest.mark.parametrize("methods", PLANS.values(), ids=PLANS)
def test_counts_are_as_measured(model, methods):
    plan = vtr.plan(model, methods)
    with vtr.reduced(model, plan) as reduction:
        model(**batch_of("llava", ONE).inputs)
    image = reduction.report().images[0]
    assert plan.counts(36) == image.per_layer
    assert [36, *plan.after(36)][-1] == len(image.retained)


@pytest.mark.parametrize(
    "method",
    [vtr.Expedit(alpha=2, grid=(4, 4)), vtr.Pool(alpha=2, grid=(3, 4)), vtr.ToMe(keep=12), vtr.Expedit(alpha=1, grid=2 / 3, blocks=2)],
)
def test_counts_of_a_vit_are_those_of_its_blocks(method):
    model = dense_models.model_of("timm")
    plan = vtr.plan(model, method)
    with vtr.reduced(model, method) as reduction:
        model(dense_models.images())
    assert plan.counts(36) == reduction.report().tokens_per_block


def test_making_a_plan_touches_nothing_and_a_plan_is_what_a_reduction_does(model):
    model(**batch_of("llava", ONE).inputs)
    before = snapshot(model)
    plan = vtr.plan(model, "fastv", keep=9)
    assert snapshot(model) == before
    assert plan.methods == (vtr.FastV(keep=9, position_ids="keep"),) == vtr.reduced(model, plan).methods == vtr.plan(model, plan).methods
    assert plan.host == "llava" == vtr.host_of(model).name
    with vtr.reduced(model, "divprune", keep=9):
        during = snapshot(model)
        assert vtr.plan(model, "fastv", keep=9).counts(36) == plan.counts(36)
        assert snapshot(model) == during


def test_a_model_without_weights_will_do():
    tower = CLIPVisionConfig(image_size=336, patch_size=14, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    with torch.device("meta"):
        large = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=LlamaConfig(vocab_size=32064)))
    plan = vtr.plan(large, "fastv", average_keep=192.0)
    assert sum(plan.counts(576)) / 32 == pytest.approx(192, abs=1) and plan.counts(576)[:2] == [576, 576]
    assert vtr.host_of(large).most_tokens == 576


def test_it_is_printed_step_by_step(model):
    plan = vtr.plan(model, [vtr.DivPrune(keep=18), vtr.FastV(keep=9, layer=1)])
    assert str(plan).splitlines()[1:] == [
        "  step         does    method    left of 36",
        "  boundary     remove  divprune  18",
        "  LLM layer 1  remove  fastv     9",
        "  mean over 5 layers: 10.8",
    ]
    assert str(plan).startswith("Plan for llava: divprune(keep=18, ") and "layer=1" in str(plan).splitlines()[0]
    assert repr(plan).startswith("Plan(llava: divprune(keep=18, ") and repr(plan).endswith("; 36 visual tokens -> 9)")
    shown = str(vtr.plan(model, vtr.Expedit(alpha=1, grid=(3, 3)))).splitlines()
    assert shown[2:4] == ["  tower layer 1  merge    expedit  9", "  tower layer 3  restore  expedit  36"]
    assert repr(vtr.plan(model, vtr.Expedit(alpha=1, grid=(3, 3)))).endswith("; 36 visual tokens -> 36)")
    assert repr(vtr.plan(model, "shortv", layers=(2, 3))).endswith("; 36 visual tokens -> 36, not computed in 2 layers)")
    assert "at most 36" in str(vtr.plan(model, "prumerge")) and repr(vtr.plan(model, "prumerge")).endswith("-> at most 36)")


@pytest.mark.parametrize("methods", PLANS.values(), ids=PLANS)
def test_it_survives_json_and_yaml(model, methods):
    plan = vtr.plan(model, methods)
    content = plan.to_dict()
    assert content == {"host": "llava", "methods": [method.resolved().to_dict() for method in methods]}
    for text in (content, json.loads(json.dumps(content)), yaml.safe_load(yaml.safe_dump(content))):
        again = vtr.plan(model, text)
        assert again.methods == plan.methods and again.counts(36) == plan.counts(36) and str(again) == str(plan)
        assert vtr.reduced(model, text).methods == vtr.reduced(model, text["methods"]).methods == plan.methods
    assert vtr.reduced(model, methods[0].to_dict()).methods == (methods[0].resolved(),)


def test_settings_beside_what_has_its_own_are_refused(model):
    plan = vtr.plan(model, "fastv", keep=9)
    for given in (plan, plan.to_dict(), [vtr.FastV()]):
        with pytest.raises(ValueError, match=r"the settings of a plan live on its methods, got keep beside a list"):
            vtr.plan(model, given, keep=8)
    with pytest.raises(
        TypeError, match=r"vtr\.apply: method must be a name, a method or a non-empty list of methods, got \{'methods': 3\}"
    ):
        vtr.plan(model, {"methods": 3})


@pytest.mark.parametrize(
    ("method", "settings", "kind", "error", "message"),
    [
        ("fastv", {"keep": 37}, "llava", ValueError, "keep=37 is above the 36 visual tokens"),
        ("fastv", {"layer": 9}, "llava", ValueError, "fastv: layer 9"),
        ("cdpruner", {"relevance": "clip", "text_tower": "somewhere"}, "llava", ValueError, "needs the question as text, got neither"),
        ("fastervlm", {}, "siglip", VtrError, "needs the CLS token"),
        ("fastv", {}, "dense", VtrError, "has no LLM"),
    ],
)
def test_what_cannot_be_done_is_refused_when_the_plan_is_made(monkeypatch, method, settings, kind, error, message):
    monkeypatch.setattr("vtr.checks.check_text_towers", lambda plan: None)  # reads a config
    model = dense_models.model_of("timm") if kind == "dense" else model_of("llava_siglip" if kind == "siglip" else kind)
    with pytest.raises(error, match=message):
        vtr.plan(model, method, **settings)


def test_a_method_that_restores_comes_before_those_that_remove_in_the_tower(model):
    with pytest.raises(
        VtrError, match=r"expedit: needs the whole token grid at tower layer 2, where centerclip has removed tokens at layer 1 already"
    ):
        vtr.plan(model, [vtr.CenterCLIP(keep=12, stage="tower", layer=1), vtr.Expedit(alpha=2, grid=(3, 3))])


# -- steps that are changed


def first(method, steps):
    """Keeps the first tokens instead of the chosen ones, one layer later."""
    return [
        replace(step, where=vtr.Layer(step.layer + 1), needs=(), select=lambda view: vtr.Selection(index=_first(view))) for step in steps
    ]


def _first(view):
    return torch.arange(view.most, device=view.tokens.device).expand(len(view.tokens), -1)


def test_changed_steps_are_what_runs(model):
    plan = vtr.plan(model, "fastv", keep=9, layer=1).map(first)
    assert [item.step.layer for item in plan.steps] == [2] and plan.steps[0].last and "(changed by map)" in str(plan)
    for _ in range(2):
        with vtr.reduced(model, plan) as reduction:
            model(**batch_of("llava", ONE).inputs)
        image = reduction.report().images[0]
        assert image.retained == list(range(9)) and image.per_layer == plan.counts(36) == [36, 36, 9, 9, 9]
    with pytest.raises(ValueError, match=r"Plan\.to_dict: steps that Plan\.map changed cannot be written down"):
        plan.to_dict()


def test_changed_steps_are_checked(model):
    plan = vtr.plan(model, "fastv", keep=9, layer=1)
    with pytest.raises(ValueError, match=r"fastv: layer must be 0 to 4"):
        vtr.reduced(model, plan.map(lambda method, steps: [replace(step, where=vtr.Layer(9)) for step in steps]))
    with pytest.raises(TypeError, match=r"fastv: steps must return a tuple of vtr\.Step, got 'none'"):
        vtr.reduced(model, replace(plan, changes=(lambda method, steps: ["none"],)))


def test_a_changed_plan_is_made_anew_for_every_size_of_image():
    model, seen = dense_models.timm_model("vit_tiny_patch16_224", dynamic_img_size=True).eval(), []
    plan = vtr.plan(model, "expedit", alpha=2, grid=0.5).map(lambda method, steps: seen.append(method.name) or steps)
    before = len(seen)
    with vtr.reduced(model, plan) as reduction:
        for side in (96, 64):
            model(dense_models.images(1, side, side))
            assert reduction.report().small_grid == (side // 32, side // 32)
    assert len(seen) > before + 2


@pytest.mark.parametrize("methods", PLANS.values(), ids=PLANS)
def test_a_copy_and_a_pickle_are_the_same_plan(model, methods):
    plan, batch = vtr.plan(model, methods), batch_of("llava", ONE)
    for again in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan), copy.copy(plan)):
        assert again.to_dict() == plan.to_dict() and str(again) == str(plan) and again.counts(36) == plan.counts(36)
        assert (again.host, again.geometry, again.llm_layers) == (plan.host, plan.geometry, plan.llm_layers)
        with vtr.reduced(model, plan):
            wanted = model(**batch.inputs).logits
        with vtr.reduced(model, again):
            assert torch.equal(model(**batch.inputs).logits, wanted)


def test_a_changed_plan_is_copied_and_pickled_with_its_change(model):
    plan = vtr.plan(model, "fastv", keep=9, layer=1).map(first)
    for again in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert str(again) == str(plan) and again.counts(36) == plan.counts(36) == [36, 36, 9, 9, 9]
    dense = vtr.plan(dense_models.model_of("timm"), vtr.ToMe(keep=12))
    assert pickle.loads(pickle.dumps(dense)).counts(36) == dense.counts(36)
