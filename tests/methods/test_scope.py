"""SCOPE against a float64 loop of the card, and on real towers."""

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import LLAVA, SIGLIP, chosen, select_without_sync
from tests.methods.towers import layers_of, random_layer, tower_view
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.scope import SCOPE, scope, scope_picks
from vtr.types import Budget, Signal

SIZES = [36, 20, 1, 7]


def slow(features, saliency, keep, alpha=1.0, combined="multiply"):
    """The card for one view, pick after pick in plain Python."""
    unit = F.normalize(features.double(), dim=-1)
    similarity = (unit @ unit.T).tolist()
    value = [float(s) ** alpha for s in saliency.double()]
    n, covered, picked = len(value), [0.0] * len(value), []
    while len(picked) < keep:
        best, at = None, -1
        for j in range(n):
            gain = sum(max(0.0, similarity[i][j] - covered[i]) for i in range(n))
            score = gain * value[j] if combined == "multiply" else gain + value[j]
            if j not in picked and (best is None or score > best):
                best, at = score, j
        picked.append(at)
        covered = [max(c, row[at]) for c, row in zip(covered, similarity)]
    return sorted(picked)


@pytest.mark.parametrize("method", [SCOPE(), SCOPE(alpha=0.5), SCOPE(combined="add")], ids=["default", "half", "add"])
@pytest.mark.parametrize("geometry", [LLAVA, SIGLIP], ids=["cls", "no-cls"])
@pytest.mark.parametrize("keep", [1, 5, 35, 36, [36, 1, 1, 6], [35, 13, 1, 6]])
def test_rows_of_a_ragged_batch_are_the_card(keep, geometry, method):
    (step,) = method.steps(geometry)
    layers = [random_layer(n, cls=int(geometry.has_cls)) for n in SIZES]
    view = tower_view(step, layers, keep, pad=5)
    kept = step.select(view).keep
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    for g, (got, layer) in enumerate(zip(chosen(view, kept), layers)):
        saliency = layer.signal(step.needs[0])
        saliency = saliency.sum(0) if saliency.ndim == 2 else saliency
        assert got.tolist() == slow(layer.output[layer.cls :], saliency, int(view.keep[g]), method.alpha, method.combined)
        alone = tower_view(step, [layer], int(view.keep[g]))
        assert torch.equal(chosen(alone, step.select(alone).keep)[0], got)


@pytest.mark.parametrize("keep", [1, 5, 19, 20])
def test_without_saliency_every_pick_covers_as_much_as_any(keep):
    """Two tokens that cover each other are tied but for rounding, so the order is not compared."""
    features = random_layer(20).output[None, 1:]
    picks, _ = scope_picks(features, None, torch.ones(1, 20, dtype=torch.bool), keep, alpha=0)
    unit = F.normalize(features[0].double(), dim=-1)
    similarity, covered = unit @ unit.T, torch.zeros(20, dtype=torch.float64)
    assert len(picks[0].unique()) == keep
    for count, pick in enumerate(picks[0]):
        gain = (similarity - covered[:, None]).clamp_min(0).sum(0)
        gain[picks[0, :count]] = 0
        assert gain[pick] >= gain.max() - 1e-5
        covered = torch.maximum(covered, similarity[:, pick])


def test_saliency_to_the_power_of_0_adds_1():
    features, saliency, real = torch.randn(1, 9, 5), torch.rand(1, 9), torch.ones(1, 9, dtype=torch.bool)
    picks, gain = scope_picks(features, saliency, real, 4, alpha=0)
    same, scores = scope_picks(features, saliency, real, 4, alpha=0, combined="add")
    assert torch.equal(picks, same) and torch.allclose(scores, gain + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_features_are_computed_in_float32(dtype):
    random = torch.Generator().manual_seed(0)
    features, saliency = torch.randn(1, 40, 12, generator=random).to(dtype), torch.rand(1, 40, generator=random)
    real, keep = torch.ones(1, 40, dtype=torch.bool), torch.tensor([12])
    assert torch.equal(scope(features, saliency, real, keep, 12), scope(features.float(), saliency, real, keep, 12))


def test_identical_zero_and_broken_tokens_are_no_problem():
    real = torch.ones(1, 10, dtype=torch.bool)
    for features in (torch.ones(1, 10, 4), torch.zeros(1, 10, 4), torch.full((1, 10, 4), torch.nan)):
        for saliency in (torch.zeros(1, 10), torch.ones(1, 10), torch.full((1, 10), torch.nan)):
            for keep in (1, 5, 9, 10):
                kept = scope(features, saliency, real, torch.tensor([keep]), keep)
                assert kept.sum() == keep
    assert scope(torch.zeros(1, 10, 4), torch.ones(1, 10), real, torch.tensor([3]), 3)[0, :3].all(), "ties: lowest index"


@pytest.mark.parametrize("geometry", [LLAVA, SIGLIP])
def test_selections_never_wait_for_the_device(geometry):
    (step,) = SCOPE().steps(geometry)
    view = tower_view(step, [random_layer(n, cls=int(geometry.has_cls)) for n in SIZES], [9, 2, 1, 3])
    select_without_sync(step, view)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 18, 35])
def test_on_a_model_every_view_keeps_what_the_card_says(kind, keep):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))  # no padding: all views get the same share
    with torch.no_grad(), vtr.reduced(model, "scope", keep_ratio=keep / 36) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    feature, layers, expected = reduction.host.feature_layers[0], layers_of(model, batch), []
    for number, (view, last) in enumerate(zip(layers[feature], layers[-1])):
        score = view.signal(Signal("cls_row")) if view.cls else last.received()
        expected += [number * 36 + i for i in slow(view.output[view.cls :], score, keep)]
    assert image["retained"] == expected


def test_defaults_and_settings():
    assert SCOPE().budget == Budget(keep_ratio=1 / 3)
    (step,) = SCOPE().steps(LLAVA)
    assert step.needs == (Signal("cls_row", layer=LLAVA.feature_layer, tower=True),) and step.side == "before_projector"
    assert SCOPE(alpha=0).steps(LLAVA)[0].needs == ()
    assert SCOPE(features="projected").steps(LLAVA)[0].side == "after_projector"
    assert SCOPE().steps(SIGLIP)[0].needs == (Signal("received", layer=SIGLIP.tower_layers - 1, tower=True),)
    with pytest.raises(ValueError, match="alpha must be 0 or more, got -1"):
        SCOPE(alpha=-1)
    with pytest.raises(ValueError, match="combined must be 'multiply' or 'add', got 'both'"):
        SCOPE(combined="both")
    with pytest.raises(ValueError, match="features must be 'tower' or 'projected', got 'pixels'"):
        SCOPE(features="pixels")
