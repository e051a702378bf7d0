"""A copy of a reduced model, or of a part of it, is a whole model of its own."""

import copy
import pickle

import pytest
import torch

import vtr
from tests.dense_models import model_of as dense_of
from tests.probes import ByAttention, Freeze, MergePairs, TowerTop
from tests.tiny_models import batch_of, build, generate, snapshot

pytestmark = pytest.mark.usefixtures("no_gradients")

PLANS = {
    "boundary": "divprune",
    "llm": "fastv",
    "tower": [TowerTop()],
    "merging in the tower": [MergePairs(stage="tower", layer=1)],
    "frozen": [ByAttention(keep=5), Freeze(layers=(4,))],
    "restored": "expedit",
    "input": "resize",
}


def applied(model, plan):
    settings = {"expedit": {"alpha": 1, "grid": (3, 3)}}.get(plan, {"keep": 9}) if isinstance(plan, str) else {}
    return vtr.reduced(model, plan, **settings)


def weights_are_apart(one, two) -> bool:
    return not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_copy_of_a_reduced_llava_is_whole(plan):
    model, batch = build("llava"), batch_of("llava")
    full = model(**batch.inputs).logits
    before = snapshot(model)
    with applied(model, plan) as reduction:
        short = model(**batch.inputs).logits
        twin, inner = copy.deepcopy(model), copy.deepcopy(model.model)
        assert snapshot(twin) == before != snapshot(model)
        assert torch.equal(twin(**batch.inputs).logits, full) and weights_are_apart(model, twin)
        whole = inner(**batch.inputs).last_hidden_state
        assert whole.shape[1] == full.shape[1]
        for weight in twin.model.vision_tower.parameters():
            weight.zero_()
        assert not torch.equal(twin(**batch.inputs).logits, full), "the copy sees with its own tower"
        assert torch.equal(model(**batch.inputs).logits, short) and reduction.report()
        with vtr.reduced(twin, "divprune", keep=7) as second:
            generate(twin, batch, 2)
            assert {len(image.retained) for image in second.report().images} == {7}
        assert twin(**batch.inputs).logits.shape == full.shape
    assert torch.equal(model(**batch.inputs).logits, full)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["language_model", "vision_tower", "multi_modal_projector"])
def test_a_copy_of_a_part_has_nothing_of_the_reduction(name):
    model = build("llava")
    before = snapshot(getattr(model.model, name))
    with vtr.reduced(model, [TowerTop(), ByAttention(keep=5)]):
        assert snapshot(getattr(model.model, name)) != before
        assert snapshot(copy.deepcopy(getattr(model.model, name))) == before


@pytest.mark.parametrize(("kind", "method", "settings"), [("ViT", "tome", {"keep": 20}), ("timm", "expedit", {"alpha": 1, "grid": (3, 3)})])
def test_a_copy_of_a_dense_vit_is_whole(kind, method, settings):
    model = copy.deepcopy(dense_of(kind))
    before = snapshot(model)
    with vtr.reduced(model, method, **settings):
        twin = copy.deepcopy(model)
        assert snapshot(model) != before
    assert snapshot(twin) == before and weights_are_apart(model, twin)
    vtr.apply(twin, method, **settings).remove()


def test_what_the_user_put_on_the_model_is_copied():
    model, seen = build("llava"), []
    mine = model.model.get_image_features
    model.model.get_image_features = mine
    model.register_forward_hook(lambda *_: seen.append("before"))
    with vtr.reduced(model, "fastv", keep=9):
        model.register_forward_hook(lambda *_: seen.append("inside"))
        model.note = "inside"
        twin = copy.deepcopy(model)
    twin(**batch_of("llava").inputs)
    assert seen == ["before", "inside"] and twin.note == "inside"
    assert vars(twin.model)["get_image_features"].__self__ is twin.model


def test_a_pickle_of_a_reduced_model_is_whole_and_needs_no_vtr():
    model, batch = build("llava"), batch_of("llava")
    with vtr.reduced(model, [TowerTop(), ByAttention(keep=5)]):
        data = pickle.dumps(model)  # a model that has run is refused by pickle, reduced or not: transformers puts local functions on it
        state = model.state_dict()
    assert b"vtr" not in data
    again = pickle.loads(data)
    assert torch.equal(again(**batch.inputs).logits, model(**batch.inputs).logits)
    assert state.keys() == model.state_dict().keys()


def test_a_model_saved_inside_is_whole(tmp_path):
    model, batch = build("llava"), batch_of("llava")
    full = model(**batch.inputs).logits
    with vtr.reduced(model, "fastv", keep=9):
        model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**batch.inputs).logits, full)


@pytest.mark.parametrize("part", ["the model", "language_model"])
def test_a_shallow_copy_is_refused(part):
    model = build("llava")
    module = model if part == "the model" else model.model.language_model
    with (
        vtr.reduced(model, "fastv", keep=9),
        pytest.raises(vtr.VtrError, match=rf"shallow copy of a reduced {type(module).__name__} .*copy\.deepcopy"),
    ):
        copy.copy(module)
    copy.copy(module)


def test_a_copy_of_a_reduction_is_one_of_the_copied_model_and_not_installed():
    model, batch = build("llava"), batch_of("llava")
    full = model(**batch.inputs).logits
    with vtr.reduced(model, "fastv", keep=9, history=True) as reduction:
        short = model(**batch.inputs).logits
        twin, own = copy.deepcopy((model, reduction))
        other = copy.copy(reduction)
        assert not own.installed and not other.installed and reduction.installed and own.history
        assert torch.equal(twin(**batch.inputs).logits, full)
        with own:
            assert torch.equal(twin(**batch.inputs).logits, short)
        with pytest.raises(vtr.VtrError, match="this model is reduced already"), other:
            pass
        assert torch.equal(model(**batch.inputs).logits, short)
    with other:
        assert torch.equal(model(**batch.inputs).logits, short)
    assert torch.equal(model(**batch.inputs).logits, full)
