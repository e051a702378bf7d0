"""VisPruner against a brute force of the card, and on real towers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vtr
from tests.methods.handmade import LLAVA, SIGLIP, chosen, select_without_sync
from tests.methods.towers import layers_of, random_layer, tower_view
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.vispruner import VisPruner, vispruner
from vtr.types import Budget, Signal

SIZES = [36, 20, 1, 7]


def slow(features, score, keep, ratio):
    """The card for one view in plain Python."""
    unit = F.normalize(features, dim=-1)
    order = sorted(range(len(features)), key=lambda i: (-float(score[i]), i))
    important = int(keep * ratio)
    stays, residual = order[:important], order[important:]
    diverse = keep - important
    if not diverse:
        return sorted(stays)
    while len(residual) > diverse:
        compared, between = residual[0::2], residual[1::2]
        less = min(8, len(residual) - diverse, len(compared))
        near = {a: max(float(unit[a] @ unit[b]) for b in between) for a in compared}
        ranked = sorted(compared, key=lambda a: -near[a])  # stable: ties by rank
        residual = ranked[less:] + between
    return sorted(stays + residual)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 45), st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0]))
def test_every_budget_is_the_card_and_exact(seed, n, ratio):
    random = torch.Generator().manual_seed(seed)
    features, score = torch.randn(1, n, 6, generator=random), torch.rand(1, n, generator=random)
    for keep in {0, 1, 2, n // 3, n // 2, n - 1, n}:
        got = vispruner(features, score, torch.ones(1, n, dtype=torch.bool), torch.tensor([keep]), n - keep, ratio)
        assert got[0].nonzero().flatten().tolist() == slow(features[0], score[0], keep, ratio)


@pytest.mark.parametrize("keep", [1, 2, 5, 17, 35, 36, [36, 1, 0, 7], [20, 13, 1, 6]])
def test_rows_of_a_ragged_batch_do_not_touch_each_other(keep):
    (step,) = VisPruner().steps(LLAVA)
    layers = [random_layer(n) for n in SIZES]
    view = tower_view(step, layers, keep, pad=5)
    kept = step.select(view).keep
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    for g, (got, layer) in enumerate(zip(chosen(view, kept), layers)):
        assert got.tolist() == slow(layer.output[1:], layer.signal(step.needs[0]), int(view.keep[g]), 0.5)


def test_identical_and_zero_tokens_are_no_problem():
    real, score = torch.ones(1, 30, dtype=torch.bool), torch.zeros(1, 30)
    for features in (torch.ones(1, 30, 4), torch.zeros(1, 30, 4), torch.full((1, 30, 4), torch.nan)):
        for keep in range(1, 31):
            assert vispruner(features, score, real, torch.tensor([keep]), 30 - keep).sum() == keep


def test_more_rounds_than_needed_change_nothing():
    random = torch.Generator().manual_seed(0)
    features, score = torch.randn(2, 40, 6, generator=random), torch.rand(2, 40, generator=random)
    real, keep = torch.ones(2, 40, dtype=torch.bool), torch.tensor([12, 39])
    assert torch.equal(vispruner(features, score, real, keep, 28), vispruner(features, score, real, keep, 40))


def test_without_cls_the_score_is_the_attention_received_in_the_last_layer():
    (step,) = VisPruner(important_ratio=1.0).steps(SIGLIP)
    assert {(need.kind, need.layer) for need in step.needs} == {("q", 5), ("k", 5)}
    layers = [random_layer(n, cls=0) for n in SIZES]
    view = tower_view(step, layers, 5, pad=1)
    for got, layer, n in zip(chosen(view, step.select(view).keep), layers, SIZES):
        assert got.tolist() == sorted(layer.received().topk(min(5, n)).indices.tolist())


@pytest.mark.parametrize("geometry", [LLAVA, SIGLIP])
def test_selections_never_wait_for_the_device(geometry):
    (step,) = VisPruner().steps(geometry)
    view = tower_view(step, [random_layer(n, cls=int(geometry.has_cls)) for n in SIZES], [9, 0, 1, 3])
    select_without_sync(step, view)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 3, 18, 35])
def test_on_a_model_every_view_keeps_what_the_card_says(kind, keep):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))  # no padding: all views get the same share
    with torch.no_grad(), vtr.reduced(model, "vispruner", keep_ratio=keep / 36) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    feature = reduction.host.feature_layers[0]
    layers = layers_of(model, batch)
    expected = []
    for number, (view, last) in enumerate(zip(layers[feature], layers[-1])):
        score = view.signal(Signal("cls_row")) if view.cls else last.received()
        expected += [number * 36 + i for i in slow(view.output[view.cls :], score, keep, 0.5)]
    assert image["retained"] == expected


def test_defaults_and_settings():
    assert VisPruner().budget == Budget(keep_ratio=128 / 576) and Budget(keep_ratio=128 / 576).resolve(576) == 128
    assert VisPruner().steps(LLAVA)[0].needs == (Signal("cls_row", layer=LLAVA.feature_layer, tower=True),)
    with pytest.raises(ValueError, match="important_ratio must be from 0 to 1, got 1.5"):
        VisPruner(important_ratio=1.5)
