"""PruneSID against a float64 loop of the card, and on real towers."""

from math import ceil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vtr
from tests.methods.handmade import LLAVA, SIGLIP, chosen, select_without_sync
from tests.methods.towers import layers_of, random_layer, tower_view
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.prunesid import PruneSID, group_quota, mean_cosine, prunesid
from vtr.types import Budget, Signal

SIZES = [36, 20, 1, 7]


def shares(size, survivors, keep, wanted):
    """Bounds and shares of the groups, step by step."""
    low = [min(1, c) for c in size]
    high = [min(5 * ceil(keep / 64), c, n) for c, n in zip(size, survivors)]
    while sum(high) < keep:
        high = [min(h + 1, c) for h, c in zip(high, size)]
    rest, before, running, quota = max(0, wanted - sum(low)), 0, 0, []
    for n, floor, most in zip(survivors, low, high):
        running += n
        reached = round(rest * running / sum(survivors))
        quota.append(min(reached - before + floor, most))
        before = reached
    for g in sorted(range(len(size)), key=lambda g: (-survivors[g], g)):
        quota[g] += min(high[g] - quota[g], rest + sum(low) - sum(quota))
    return quota


def slow(features, score, keep):
    """The card for one view in plain Python, with components of a singular value decomposition."""
    n, groups = len(features), max(keep // 4, 1)
    rows = features.double().sigmoid()
    rows = rows - rows.mean(1, keepdim=True)
    weight = torch.linalg.svd(rows, full_matrices=False)[0][:, :groups].abs()
    group = weight.argmax(1).tolist()
    value = [float(weight[i, group[i]]) for i in range(n)] if score is None else score.double().tolist()
    unit = F.normalize(features.double(), dim=-1)
    near = (unit @ unit.T).tolist()
    pairs = [near[i][j] for i in range(n) for j in range(i + 1, n)]
    threshold = keep / 32 * (sum(pairs) / len(pairs) if pairs else 0)
    order = []
    for g in range(groups):
        left = sorted((i for i in range(n) if group[i] == g), key=lambda i: (-value[i], i))
        picked, dropped = [], []
        while left:
            best, left = left[0], left[1:]
            picked.append(best)
            dropped += [i for i in left if near[best][i] > threshold]
            left = [i for i in left if near[best][i] <= threshold]
        order.append((len(picked), picked + sorted(dropped, key=lambda i: (-value[i], i))))
    quota = shares([len(tokens) for _, tokens in order], [count for count, _ in order], keep, keep)
    return sorted(i for q, (_, tokens) in zip(quota, order) for i in tokens[:q])


@pytest.mark.parametrize("score", [None, "component"])
@pytest.mark.parametrize("geometry", [LLAVA, SIGLIP], ids=["cls", "no-cls"])
@pytest.mark.parametrize("keep", [1, 5, 16, 35, 36, [36, 1, 1, 6], [17, 13, 1, 6]])
def test_rows_of_a_ragged_batch_are_the_card(keep, geometry, score):
    (step,) = PruneSID(score=score).steps(geometry)
    layers = [random_layer(n, cls=int(geometry.has_cls)) for n in SIZES]
    given = layers if step.needs else [{0: layer} for layer in layers]
    view = tower_view(step, given, keep, pad=5)
    kept = step.select(view).keep
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    for g, (got, layer) in enumerate(zip(chosen(view, kept), layers)):
        saliency = layer.signal(step.needs[0]) if step.needs else None
        assert got.tolist() == slow(layer.output[layer.cls :], saliency, int(view.keep[g]))
        alone = tower_view(step, given[g : g + 1], int(view.keep[g]))
        assert torch.equal(chosen(alone, step.select(alone).keep)[0], got)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 300), st.booleans())
def test_shares_are_those_of_the_card(seed, groups, keep, with_cls):
    dice = torch.Generator().manual_seed(seed)
    size = torch.randint(0, 40, (1, groups), generator=dice)
    size[0, 0] += 1
    survivors = torch.where(size > 0, 1 + (torch.rand(1, groups, generator=dice) * size).long().clamp_max(size - 1), 0)
    keep = min(max(keep, groups + 1), int(size.sum()))
    wanted = max(keep - with_cls, int((size > 0).sum()))
    quota = group_quota(size, survivors, torch.tensor([keep]), torch.tensor([wanted]), keep)
    if wanted <= keep:
        assert quota[0].tolist() == shares(size[0].tolist(), survivors[0].tolist(), keep, wanted) and quota.sum() == wanted


def test_identical_zero_and_broken_tokens_are_no_problem():
    real = torch.ones(1, 10, dtype=torch.bool)
    for features in (torch.ones(1, 10, 4), torch.zeros(1, 10, 4), torch.full((1, 10, 4), torch.nan)):
        for score in (None, torch.zeros(1, 10), torch.full((1, 10), torch.nan)):
            for keep in (1, 5, 9, 10):
                kept = prunesid(features, score, real, torch.tensor([keep]), keep)
                assert kept[0, :keep].all() and kept.sum() == keep, "ties: lowest index"


def test_the_mean_cosine_is_over_pairs():
    unit = F.normalize(torch.randn(1, 6, 4, dtype=torch.float64), dim=-1)
    real = torch.tensor([[True, True, False, True, True, False]])
    own = unit[0, real[0]]
    expected = (own @ own.T)[torch.ones(4, 4).triu(1).bool()].mean()
    torch.testing.assert_close(mean_cosine(unit, real)[0], expected)


@pytest.mark.parametrize("geometry", [LLAVA, SIGLIP])
def test_selections_never_wait_for_the_device(geometry):
    (step,) = PruneSID().steps(geometry)
    layers = [random_layer(n, cls=int(geometry.has_cls)) for n in SIZES]
    select_without_sync(step, tower_view(step, layers if step.needs else [{0: layer} for layer in layers], [9, 2, 1, 3]))


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 18, 35])
def test_on_a_model_every_view_keeps_what_the_card_says(kind, keep):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))  # no padding: all views get the same share
    with torch.no_grad(), vtr.reduced(model, "prunesid", keep_ratio=keep / 36) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    expected = []
    for number, view in enumerate(layers_of(model, batch)[reduction.host.feature_layers[0]]):
        score = view.signal(Signal("cls_row")) if view.cls else None
        expected += [number * 36 + i for i in slow(view.output[view.cls :], score, keep)]
    assert image["retained"] == expected


def test_defaults_and_mistakes():
    assert PruneSID().budget == Budget(keep_ratio=1 / 9)
    assert PruneSID().steps(LLAVA)[0].needs == (Signal("cls_row", layer=LLAVA.feature_layer, tower=True),)
    assert PruneSID().steps(SIGLIP)[0].needs == PruneSID(score="component").steps(LLAVA)[0].needs == ()
    with pytest.raises(ValueError, match="score must be 'saliency', 'component' or None"):
        PruneSID(score="cls")
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        PruneSID(compat="paper")
    with pytest.raises(vtr.VtrError, match="compat='authors' draws components"):
        PruneSID(compat="authors").steps(LLAVA)
    with pytest.raises(vtr.VtrError, match="score='saliency' needs a CLS token"):
        PruneSID(score="saliency").steps(SIGLIP)
