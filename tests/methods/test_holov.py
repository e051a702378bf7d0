"""HoloV against a float64 loop of the card."""

import itertools
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtr
from scripts.replay.holov import authors_crop_score, authors_order, authors_quota
from tests.methods.handmade import IMAGES, LLAVA, NEXT, ONE, SIGLIP, chosen, make_view, select_without_sync
from tests.methods.towers import layers_of
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.holov import HoloV, bands, crop_count, dealt, holistic_score, holov
from vtr.types import Budget, Signal

GRIDS = [(6, 6), (4, 5), (1, 1), (1, 7), (7, 1)]


def cut(n, crops):
    """Runs of equal length, the first ones longer by one."""
    ends = [0]
    for c in range(crops):
        ends.append(ends[-1] + n // crops + (c < n % crops))
    return [list(range(a, b)) for a, b in itertools.pairwise(ends)]


def shares(weight, sizes, keep):
    """Rounded down, the rest to the heaviest; crops that get too much are closed and the rest is dealt again."""
    open_ = list(range(len(sizes)))
    while True:
        left = keep - sum(size for c, size in enumerate(sizes) if c not in open_)
        total = sum(weight[c] for c in open_)
        part = {c: left * (weight[c] / total if total else 1 / len(open_)) for c in open_}
        got = {c: floor(part[c] + 1e-9) for c in open_}
        for c in sorted(open_, key=lambda c: (-weight[c], c))[: left - sum(got.values())]:
            got[c] += 1
        full = [c for c in open_ if got[c] > sizes[c]]
        if not full:
            return [got.get(c, size) for c, size in enumerate(sizes)]
        open_ = [c for c in open_ if c not in full]


def holistic(score, features):
    n = len(score)
    if n == 1:
        return list(score)
    unit = [x / (x.norm() + 1e-6) for x in features]
    near = [[0.0 if i == j else float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    mean = [sum(row) / (n - 1) for row in near]
    spread = [sum((s - m) ** 2 for s in row) / (n - 1) for row, m in zip(near, mean)]
    level, width = sum(map(abs, score)) / n, sum(map(abs, spread)) / n
    return [a + v * level / (width + 1e-6) for a, v in zip(score, spread)]


def slow(score, keep, crops=None, tau=1.0, features=None):
    """The card for one image in plain Python."""
    score, n = [float(s) for s in score], len(score)
    crops = min(max(floor(1024 * n / (576 * keep) + 1e-12) if crops is None else crops, 1), n)
    parts = cut(n, crops)
    weight = [(sum(score[i] for i in part) / len(part)) ** tau for part in parts]
    kept = []
    for part, share in zip(parts, shares(weight, [len(part) for part in parts], keep)):
        own = [score[i] for i in part]
        ranked = own if features is None else holistic(own, features[part].double())
        kept += [part[i] for i in sorted(range(len(part)), key=lambda i: (-ranked[i], i))[:share]]
    return sorted(kept)


def view_with(method, view, geometry=LLAVA):
    """The View with random scores, peaked so that some crops overflow; the same for the same image."""
    (step,) = method.steps(geometry)
    score = torch.full(view.real.shape, 9.0)
    for g, real in enumerate(view.real):
        n = int(real.sum())
        score[g, real] = torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 4
    view.signals = {step.needs[0]: score}
    return step, view


METHODS = {
    "default": HoloV(),
    "crops": HoloV(crops=5),
    "sharp": HoloV(tau=3.0, crops=4),
    "flat": HoloV(tau=0.0),
    "holistic": HoloV(rule="holistic", crops=4),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("keep", [1, 5, 13, 35, 36, [36, 19, 1, 6, 3], [18, 13, 1, 2, 7]])
def test_rows_of_a_ragged_batch_are_the_card(keep, behind, name):
    method = METHODS[name]
    step, view = view_with(method, make_view([ONE] * 5, keep, grid=GRIDS, filler=4, behind=behind))
    kept = step.select(view).keep
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    for g, got in enumerate(chosen(view, kept)):
        (score,), tokens = (s[g, view.real[g]] for s in view.signals.values()), view.tokens[g, view.real[g]]
        count, features = int(view.keep[g]), tokens if method.rule == "holistic" else None
        assert got.tolist() == slow(score, count, method.crops, method.tau, features)
        _, alone = view_with(method, make_view([ONE], count, grid=GRIDS[g]))
        assert torch.equal(chosen(alone, step.select(alone).keep)[0], got)


@pytest.mark.parametrize("keep", [9, [70, 35, 99, 30]])
def test_bands_go_over_thumbnail_and_canvas(keep):
    step, view = view_with(HoloV(), make_view(IMAGES, keep, filler=2), NEXT)
    for g, got in enumerate(chosen(view, step.select(view).keep)):
        (score,) = (s[g, view.real[g]] for s in view.signals.values())
        assert got.tolist() == slow(score, int(view.keep[g]))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.sampled_from([1.0, 6.0]))
def test_every_budget_is_exact_whatever_overflows(seed, n, keep, crops, tau):
    keep = min(keep, n)
    score = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    kept = holov(score, torch.ones(1, n, dtype=torch.bool), torch.tensor([keep]), [n], [keep], crops, tau)
    assert kept[0].nonzero()[:, 0].tolist() == slow(score[0], keep, crops, tau)


def test_scores_of_zero_are_shared_alike():
    real = torch.ones(1, 12, dtype=torch.bool)
    kept = holov(torch.zeros(1, 12), real, torch.tensor([5]), [12], [5], 3)
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1, 4, 5, 8]
    one = torch.zeros(1, 12)
    one[0, 0] = 1.0  # one crop has all weight and too few tokens
    assert holov(one, real, torch.tensor([6]), [12], [6], 3)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 8]
    for broken in (torch.full((1, 12), torch.nan), torch.full((1, 12), -1.0)):
        assert holov(broken, real, torch.tensor([5]), [12], [5], 3).sum() == 5


def test_the_surplus_of_full_crops_is_dealt_again():
    weight, size = torch.tensor([[10.0, 5.0, 1.0, 1.0]], dtype=torch.float64), torch.tensor([[3, 3, 3, 3]])
    assert dealt(weight, size, torch.tensor([9]), 5).tolist() == [[3, 3, 2, 1]]
    assert dealt(weight, size, torch.tensor([12]), 5).tolist() == [[3, 3, 3, 3]]


def test_the_code_leaves_places_of_full_crops_empty():
    score = torch.tensor([[0.4, 0.3, 0.01, 0.02, 0.01, 0.02]])
    crops = bands(torch.ones(1, 6, dtype=torch.bool), [6], [3])
    quota = authors_quota(authors_crop_score(score, torch.randn(1, 6, 4), crops), 4)
    assert quota.tolist() == [[4, 0, 0]]
    assert authors_order(score, quota, crops, 4).tolist() == [[0, 1, -1, -1]]
    assert holov(score, torch.ones(1, 6, dtype=torch.bool), torch.tensor([4]), [6], [4], 3).sum() == 4


def test_features_have_no_influence_on_the_quotas_of_the_code():
    score = torch.rand(1, 36, generator=torch.Generator().manual_seed(0))
    crops = bands(torch.ones(1, 36, dtype=torch.bool), [36], [4])
    one, other = (authors_crop_score(score, torch.randn(1, 36, 8), crops) for _ in range(2))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_bands_of_a_padded_row():
    real = torch.tensor([[False, True, True, True, False, True, True], [True, True, False, False, False, False, False]])
    parts = bands(real, [5, 2], [2, 1])
    assert parts.token[0][parts.real[0]].tolist() == [1, 2, 3, 5, 6] and parts.keep.tolist() == [[3, 2], [2, 0]]
    assert [crop_count(576, k) for k in (64, 128, 192, 576)] == [16, 8, 5, 1] and crop_count(7, 1) == 7 and crop_count(364, 72) == 8


def test_a_crop_of_one_token_is_like_any_other():
    score = torch.tensor([[0.1, 0.9, 0.2]])
    assert holov(score, torch.ones(1, 3, dtype=torch.bool), torch.tensor([1]), [3], [1], 3)[0].tolist() == [False, True, False]
    assert torch.equal(holistic_score(score.T, torch.randn(3, 1, 4), torch.ones(3, 1, dtype=torch.bool)), score.T)


@pytest.mark.parametrize("method", [HoloV(), HoloV(rule="holistic")], ids=["attention", "holistic"])
def test_selections_never_wait_for_the_device(method):
    step, view = view_with(method, make_view([ONE] * 5, [9, 2, 1, 3, 7], grid=GRIDS))
    select_without_sync(step, view)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 9, 35])
def test_on_a_model_it_is_the_card(kind, keep):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))
    with torch.no_grad(), vtr.reduced(model, "holov", keep=keep) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    layers = layers_of(model, batch)
    score = [
        view.signal(Signal("cls_row")) if view.cls else last.received()
        for view, last in zip(layers[reduction.host.feature_layers[0]], layers[-1])
    ]
    if kind != "llava_next":  # the canvas is in raster order over crops
        assert image["retained"] == slow(score[0], keep)
        return
    order = [36 * v + 6 * r + c for v, r, c in make_view([((2, 2), (96, 96))], 1).cells[0].tolist()]
    scores = torch.cat(score)
    assert sorted(image["retained"]) == sorted(order[i] for i in slow(scores[order], keep))


def test_defaults_and_mistakes():
    assert HoloV().budget == Budget(keep_ratio=1 / 9)
    assert HoloV().steps(LLAVA)[0].needs == (Signal("cls_row", layer=LLAVA.feature_layer, tower=True),)
    assert HoloV().steps(SIGLIP)[0].needs == (Signal("received", layer=SIGLIP.tower_layers - 1, tower=True),)
    with pytest.raises(ValueError, match="rule must be 'attention' or 'holistic', got 'paper'"):
        HoloV(rule="paper")
    with pytest.raises(ValueError, match="crops must be 1 or more, got 0"):
        HoloV(crops=0)
    with pytest.raises(ValueError, match="tau must be 0 or more, got -1"):
        HoloV(tau=-1.0)
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        HoloV(compat="paper")
    with pytest.raises(vtr.VtrError, match="compat='authors' puts zero vectors"):
        HoloV(compat="authors").steps(LLAVA)
