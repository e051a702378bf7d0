"""TokenCorr against the definition of its card, and exact budgets of the variant that is ours."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import IMAGES, LLAVA, NEXT, cells_of, chosen, make_view, select_without_sync
from tests.methods.towers import random_layer, tower_view
from tests.tiny_models import batch_of, model_of
from vtr.methods.tokencorr import NOTES, TokenCorr, distribution, information_density, local_number, similar_counts, tokencorr
from vtr.ops.topk import quota

SIZES = [36, 20, 1, 7]


def slow(keys, low, deep, alpha, rho):
    """The card for one view: density, local patches (most probable), global patches."""
    n = len(keys)
    unit = F.normalize(keys, dim=-1)
    similar = [sum(float(unit[i] @ unit[j]) > alpha for j in range(n) if j != i) for i in range(n)]
    density = 1 - sum(s > rho * (n - 1) for s in similar) / n
    number = min(max(int(np.floor(density * n + 0.5)), 1), n)
    deep = (deep / deep.sum()).double()
    first, third = np.percentile(deep.numpy(), [25, 75])
    far = {i for i in range(n) if float(deep[i]) > third + 1.5 * (third - first)}
    return density, set(low.argsort(descending=True, stable=True)[:number].tolist()), far


@pytest.mark.parametrize(("alpha", "rho"), [(0.3, 0.2), (0.2, 0.1), (-1.0, 0.0), (1.0, 0.5)])
def test_adaptive_is_the_card_for_every_row_of_a_ragged_batch(alpha, rho):
    (step,) = TokenCorr(alpha=alpha, rho=rho).steps(LLAVA)
    _, local, deeper = step.needs
    layers = [{local.layer: random_layer(n, s), deeper.layer: random_layer(n, s + 50)} for s in range(4) for n in SIZES]
    view = tower_view(step, layers, 36, pad=2)
    kept = step.select(view).keep
    densities = set()
    for got, layer in zip(chosen(view, kept), layers):
        low, deep = layer[local.layer], layer[deeper.layer]
        density, near, far = slow(low.key[1:], low.signal(local), deep.signal(deeper), alpha, rho)
        assert got.tolist() == sorted(near | far)
        densities.add(density)
    assert len(densities) > 1 or alpha in (-1.0, 1.0)
    select_without_sync(step, view)


def test_the_extremes_of_density():
    real = torch.ones(1, 8, dtype=torch.bool)
    alike, apart = torch.ones(1, 8, 4), torch.eye(8)[None]
    for keys, counts, density, number in ((alike, 7, 0.0, 1), (apart, 0, 1.0, 8)):
        similar = similar_counts(keys, real, 0.8)
        assert similar.tolist() == [[counts] * 8]
        got = information_density(similar, real, 0.05)
        assert got.tolist() == [density] and local_number(got, real).tolist() == [number]
    nobody = torch.zeros(1, 8, dtype=torch.bool)
    assert not similar_counts(alike, nobody, 0.8).any() and local_number(torch.zeros(1), nobody).tolist() == [0]
    near, far = tokencorr(torch.zeros(1), torch.rand(1, 8), torch.rand(1, 8), nobody)
    assert not near.any() and not far.any()
    assert local_number(torch.tensor([0.5]).double(), torch.ones(1, 5, dtype=torch.bool)).tolist() == [3], "half up"


def test_distributions_sum_to_one_over_real_tokens():
    real = torch.tensor([[True, True, False], [False, False, False]])
    got = distribution(torch.tensor([[0.1, 0.3, 0.5]] * 2), real)
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.75, 0], [0, 0, 0]], dtype=torch.float64))


def noted(view, density, priority):
    """The View of the second step with the notes that the first leaves."""
    view.per_token[NOTES] = torch.stack([density, priority], -1)
    return view


@pytest.mark.parametrize("keep", [1, 2, 9, 30, 100, 10**6])
def test_a_budget_is_shared_by_informative_patches_and_exact(keep):
    _, step = TokenCorr(keep=1).steps(NEXT)
    view = make_view(IMAGES, keep, filler=2)
    part = view.cells[..., 0]
    density, priority = (part + 1).double() / 10, torch.rand(3000, generator=torch.Generator().manual_seed(0))[view.patch].double()
    kept = step.select(noted(view, density, priority)).keep
    assert torch.equal(kept.sum(1), view.keep)
    for g, got in enumerate(chosen(view, kept)):
        cells = cells_of(IMAGES[g])[:, 0]
        capacity = torch.bincount(cells)
        share = quota((capacity * (torch.arange(len(capacity)) + 1) / 10)[None], capacity[None], view.keep[g : g + 1])[0]
        expected = []
        for v, budget in enumerate(share.tolist()):
            own = (cells == v).nonzero().flatten()
            expected += own[priority[g, view.real[g]][own].argsort(descending=True, stable=True)[:budget]].tolist()
        assert got.tolist() == sorted(expected)


def test_with_a_budget_outliers_come_first_and_then_the_most_probable():
    look, _ = TokenCorr(keep=5).steps(LLAVA)
    _, local, deeper = look.needs
    assert (look.action, look.per, look.counted) == ("observe", "view", False)
    low, deep = random_layer(36, 1), random_layer(36, 52)
    view = tower_view(look, [{local.layer: low, deeper.layer: deep}], 5)
    assert look.select(view) is None
    _, _, far = slow(low.key[1:], low.signal(local), deep.signal(deeper), 0.8, 0.05)
    assert 0 < len(far) < 30
    order = view.per_token[NOTES][0, :, 1].argsort(descending=True).tolist()
    first = sorted(far, key=lambda i: -float(deep.signal(deeper)[i]))
    rest = sorted(set(range(36)) - far, key=lambda i: -float(low.signal(local)[i]))
    assert order == first + rest


def test_a_seed_draws_and_no_seed_takes_the_most_probable():
    def kept(seed):
        (step,) = TokenCorr(alpha=0.2, rho=0.2, seed=seed).steps(LLAVA)
        layers = [random_layer(n) for n in SIZES]
        view = tower_view(step, layers, 36)
        mask = step.select(view).keep
        select_without_sync(step, view)
        return mask

    draws = [kept(seed) for seed in range(6)]
    assert torch.equal(kept(3), draws[3]) and len({tuple(d.flatten().tolist()) for d in draws}) > 3
    assert torch.equal(kept(None), kept(None))


def test_draws_are_without_replacement_in_proportion_to_attention():
    """An exponential race: the first pick of many follows the probabilities."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    uniform = torch.rand(4000, 4, generator=generator, dtype=torch.float64)
    near, _ = tokencorr(torch.zeros(4000), p / -uniform.log(), p.expand(4000, -1), torch.ones(4000, 4, dtype=torch.bool))
    torch.testing.assert_close(near.double().mean(0), p, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_adaptive_counts_follow_the_image_and_not_the_batch(kind):
    model, batch = model_of(kind), batch_of(kind)
    with torch.no_grad(), vtr.reduced(model, "tokencorr", alpha=0.3, rho=0.3, seed=1) as reduction:
        model(**batch.inputs)
        together = [image["retained"] for image in reduction.report().to_dict()["images"]]
        alone = []
        for row in range(2):
            model(**batch.row(row).inputs)
            alone += [image["retained"] for image in reduction.report().to_dict()["images"]]
    assert together == alone and len({len(ids) for ids in together}) > 1


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("keep", [1, 5, 20, 35])
def test_a_budget_is_exact_on_a_model(kind, keep):
    model, batch = model_of(kind), batch_of(kind)
    with torch.no_grad(), vtr.reduced(model, "tokencorr", keep=keep) as reduction:
        model(**batch.inputs)
        assert {len(image["retained"]) for image in reduction.report().to_dict()["images"]} == {keep}


def test_sharing_out_never_waits_for_the_device():
    _, step = TokenCorr(keep=9).steps(NEXT)
    view = make_view(IMAGES, 9)
    notes = torch.rand(*view.real.shape, 2, dtype=torch.float64)
    inner = step.select

    def with_notes(seen):
        seen.per_token[NOTES] = seen.tokens.new_zeros(*notes.shape, dtype=torch.float64)
        return inner(seen)

    select_without_sync(vtr.Remove(vtr.Boundary(), with_notes), view)


def test_it_is_experimental_and_settings_are_checked():
    assert TokenCorr.card.experimental and TokenCorr().budget is None
    assert [need.layer for need in TokenCorr().steps(LLAVA)[0].needs] == [1, 1, 4], "a quarter of the way to layer 4"
    with pytest.raises(ValueError, match="alpha must be a cosine from -1 to 1, got 2"):
        TokenCorr(alpha=2)
    with pytest.raises(ValueError, match="rho must be a share from 0 to 1, got -1"):
        TokenCorr(rho=-1)
    with pytest.raises(ValueError, match="low must be a tower layer, 0 or more, or None, got -1"):
        TokenCorr(low=-1)
    with pytest.raises(ValueError, match="low=6 is not one of the tower's layers 0 to 5"):
        TokenCorr(low=6).steps(LLAVA)
    with pytest.raises(TypeError, match="seed must be an integer or None"):
        TokenCorr(seed="x")
