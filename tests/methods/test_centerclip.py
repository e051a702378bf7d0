from dataclasses import replace

import pytest
import torch

import vtr
from tests.methods.handmade import IMAGES, LLAVA, NEXT, chosen, make_view, select_without_sync
from tests.test_contract import retained_of
from tests.tiny_models import batch_of, model_of, most_tokens
from vtr.methods.centerclip import CenterCLIP, automatic_neighbours, centerclip

VARIANTS = [
    CenterCLIP(),
    CenterCLIP(distance="cosine"),
    CenterCLIP(algorithm="spectral"),
    CenterCLIP(aggregation="mean"),
    CenterCLIP(stage="boundary"),
    CenterCLIP(stage="boundary", algorithm="spectral", aggregation="mean"),
]
variants = pytest.mark.parametrize("method", VARIANTS, ids=lambda m: f"{m.stage}-{m.algorithm}-{m.distance}-{m.aggregation}")


def answer(view, method):
    (step,) = method.steps(NEXT)
    return step.select(view)


@variants
@pytest.mark.parametrize("keep", [1, 9, [35, 36, 60, 2]])
def test_budgets_are_exact_and_merged_tokens_are_means(method, keep):
    view = make_view(IMAGES, keep, filler=3)
    found = answer(view, method)
    assert found.keep.sum(1).tolist() == view.keep.tolist() and not (found.keep & ~view.real).any()
    if method.aggregation == "mean":
        for g in range(4):
            own = found.assign[g, view.real[g]]
            assert set(own.tolist()) == set(found.keep[g].nonzero()[:, 0].tolist())
            for pivot in own.unique().tolist():
                torch.testing.assert_close(found.tokens[g, pivot], view.tokens[g, found.assign[g] == pivot].mean(0))


@variants
def test_batch_and_padding_change_nothing(method):
    together = make_view(IMAGES, 12)
    kept = chosen(together, answer(together, method).keep)
    for g, image in enumerate(IMAGES):
        alone = make_view([image], 12, filler=5)
        assert torch.equal(chosen(alone, answer(alone, method).keep)[0], kept[g])


def test_rows_without_a_share_keep_nothing():
    view = make_view(IMAGES, [3, 9, 1, 2])
    view.keep[2] = 0
    for method in VARIANTS:
        assert answer(view, method).keep.sum(1).tolist() == [3, 9, 0, 2]


def test_medoids_have_the_smallest_sum_in_their_cluster():
    tokens = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0))
    found = centerclip(tokens, torch.ones(1, 50, dtype=torch.bool), torch.tensor([8]), 8)
    far = torch.cdist(tokens[0].double(), tokens[0].double())
    for number, medoid in enumerate(found.medoid[0].tolist()):
        members = (found.cluster[0] == number).nonzero()[:, 0]
        assert members[far[members][:, members].sum(1).argmin()] == medoid


@pytest.mark.parametrize("method", [m for m in VARIANTS if m.algorithm == "kmedoids" and m.aggregation == "none"])
def test_selections_never_wait_for_the_device(method):
    (step,) = method.steps(LLAVA)
    select_without_sync(step, make_view(IMAGES, 9))


@variants
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@torch.no_grad()
def test_every_variant_runs_in_a_model(kind, method):
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, replace(method, keep=12)) as reduction:
        logits = model(**batch.inputs).logits
    assert [len(ids) for ids in retained_of(reduction.report())] == [12] * 3 and logits[:, -1].isfinite().all()


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.filterwarnings("ignore:.*keep.*")
@torch.no_grad()
def test_every_variant_is_the_full_model_when_all_stay(kind):
    model, batch = model_of(kind), batch_of(kind)
    full = model(**batch.inputs).logits
    for method in VARIANTS:
        with vtr.reduced(model, replace(method, keep=most_tokens(kind))):
            assert torch.equal(model(**batch.inputs).logits, full)


def test_steps_and_settings():
    (step,) = CenterCLIP().steps(LLAVA)
    assert (step.stage, step.layer, step.action, step.per) == ("tower", 3, "remove", "view")
    deep = replace(LLAVA, tower_layers=24, feature_layer=22)
    assert CenterCLIP().steps(deep)[0].layer == 12 and CenterCLIP(layer=6).steps(deep)[0].layer == 6
    assert CenterCLIP(aggregation="mean").steps(LLAVA)[0].action == "merge"
    assert [automatic_neighbours(*case) for case in ((49, 3), (196, 3), (36, 1), (576, 1))] == [15, 20, 5, 10]
    for name in ("stage", "algorithm", "distance", "aggregation"):
        with pytest.raises(ValueError, match=f"centerclip: {name} must be one of"):
            CenterCLIP(**{name: "x"})
    for wrong in ({"layer": -1}, {"sigma": 0}, {"iterations": -1}, {"neighbours": 0}):
        with pytest.raises(ValueError, match=f"centerclip: .*{next(iter(wrong))}"):
            CenterCLIP(**wrong)
