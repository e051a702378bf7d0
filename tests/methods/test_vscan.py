"""VScan against a loop of the card, and on real models."""

from dataclasses import replace
from math import ceil

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import IMAGES, LLAVA, NEXT, ONE, SIGLIP, chosen, make_view, select_without_sync
from tests.methods.towers import layers_of
from tests.tiny_models import Shot, batch_of, model_of
from vtr.engine.selections import chosen_mask
from vtr.methods.vscan import VScan
from vtr.ops.joining import join_nearest
from vtr.ops.topk import quota
from vtr.types import Budget, PerToken, Signal

GRIDS = [(6, 6), (4, 5), (1, 1), (1, 7), (13, 8)]


def slow(shallow, deep, cells, keep, side, cls):
    """Local and global tokens of one image in plain Python; `cells` are (view, row, column) of the real tokens."""
    n, wanted = len(cells), keep // 2
    places = [(v, r // side, c // side) for v, r, c in cells.tolist()]
    windows = sorted(set(places))
    ranked = sorted(range(n), key=lambda i: (-float(shallow[i]), i))
    if cls:
        sizes = torch.tensor([[places.count(w) for w in windows]])
        share = dict(zip(windows, quota(sizes.double(), sizes, torch.tensor([wanted]))[0].tolist()))
    else:
        share = dict.fromkeys(windows, ceil(wanted / len(windows)))
    local = []
    for i in ranked:
        if share[places[i]] and len(local) < wanted:
            share[places[i]] -= 1
            local.append(i)
    rest = sorted((i for i in range(n) if i not in local), key=lambda i: (-float(deep[i]), i))
    return sorted(local + rest[: keep - len(local)])


def joined(tokens, kept):
    """Every other token joins the kept token of highest cosine, which becomes the mean of all of them."""
    unit = F.normalize(tokens.double(), dim=-1)
    groups = {k: [k] for k in kept}
    for i in range(len(tokens)):
        if i not in groups:
            groups[max(kept, key=lambda k: (float(unit[i] @ unit[k]), -k))].append(i)
    return torch.stack([tokens[groups[k]].double().mean(0) for k in kept]).to(tokens.dtype)


def view_with(step, view):
    """The View with random scores of both layers, the same for the same image."""
    for number, need in enumerate(step.needs):
        score = torch.full(view.real.shape, 9.0)
        for g, real in enumerate(view.real):
            n = int(real.sum())
            score[g, real] = torch.rand(n, generator=torch.Generator().manual_seed(100 * number + n))
        view.signals = {**view.signals, need: score}
    return view


@pytest.mark.parametrize("geometry", [LLAVA, SIGLIP], ids=["cls", "no-cls"])
@pytest.mark.parametrize("side", [None, 2])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("keep", [1, 5, 35, 36, [36, 19, 1, 6, 103], [18, 13, 1, 2, 40]])
def test_rows_of_a_ragged_batch_are_the_card(keep, behind, side, geometry):
    step = VScan(window=side).steps(geometry)[0]
    view = view_with(step, make_view([ONE] * 5, keep, grid=GRIDS, filler=4, behind=behind))
    answer = step.select(view)
    kept = chosen_mask(answer, view)
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    for g, got in enumerate(chosen(view, kept)):
        real, count = view.real[g], int(view.keep[g])
        scores = [view.signals[need][g, real] for need in step.needs]
        assert got.tolist() == slow(*scores, view.cells[g, real], count, side or 6, geometry.has_cls)
        torch.testing.assert_close(answer.tokens[g, :count], joined(view.tokens[g, real], got.tolist()))
        assert (answer.assign[g, ~real] == -1).all() and kept[g][answer.assign[g, real]].all()
        alone = view_with(step, make_view([ONE], count, grid=GRIDS[g]))
        again = step.select(alone)
        assert torch.equal(chosen(alone, chosen_mask(again, alone))[0], got)
        torch.testing.assert_close(again.tokens[0], answer.tokens[g, :count])


@pytest.mark.parametrize("keep", [9, [70, 35, 99, 30]])
def test_windows_stay_inside_their_view(keep):
    step = VScan(window=4).steps(NEXT)[0]  # images of several views in one row, as a video with frames='all' has them
    view = view_with(step, make_view(IMAGES, keep, filler=2))
    for g, got in enumerate(chosen(view, chosen_mask(step.select(view), view))):
        scores = [view.signals[need][g, view.real[g]] for need in step.needs]
        assert got.tolist() == slow(*scores, view.cells[g, view.real[g]], int(view.keep[g]), 4, True)


def test_identical_zero_and_broken_tokens_are_no_problem():
    kept = torch.tensor([[False, True, False, True, False, False]])
    for fill in (0.0, 1.0):
        _, values, assign = join_nearest(torch.full((1, 6, 4), fill), None, kept, ~kept, kept, 2)
        assert assign[0].tolist() == [1, 1, 1, 3, 1, 1] and (values == fill).all(), "ties: the first"
    assert join_nearest(torch.full((1, 6, 4), torch.nan), None, kept, ~kept, kept, 2).assign[0].tolist() == [1, 1, 1, 3, 1, 1]


def test_the_last_token_ranks_in_the_llm():
    prune = VScan().steps(LLAVA)[1]
    view = make_view(IMAGES, 9, text=[4, 5, 6, 7])
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 16, 12, generator=dice) / 4
    view.signals = {
        need: PerToken(*((t @ w).unflatten(-1, (4, 3)) for t in (view.tokens, view.text.tokens))) for need, w in zip(prune.needs, weight)
    }
    kept = prune.select(view).keep
    for g, got in enumerate(chosen(view, kept)):
        query, key = view.signals.values()
        last = query.text[g][view.text.real[g]][-1].double()
        keys = torch.cat([key.visual[g][view.real[g]], key.text[g][view.text.real[g]]]).double()
        score = (torch.einsum("hd,nhd->hn", last, keys) * 3**-0.5).softmax(-1).mean(0)[: view.counts[g]]
        assert got.tolist() == sorted(score.topk(9).indices.tolist())
    select_without_sync(prune, view)


@pytest.mark.parametrize("geometry", [LLAVA, SIGLIP])
def test_selections_never_wait_for_the_device(geometry):
    step = VScan().steps(geometry)[0]
    select_without_sync(step, view_with(step, make_view([ONE] * 5, [9, 2, 1, 3, 7], grid=GRIDS)))


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 12, 35])
def test_on_a_model_every_view_keeps_what_the_card_says(kind, keep):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))  # no padding: all views get the same share
    with torch.no_grad(), vtr.reduced(model, "vscan", keep_ratio=keep / 36, ratio=1.0, window=3) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    layers, geometry, expected = layers_of(model, batch), reduction.host.geometry(), []
    early, late = (need.layer for need in VScan(ratio=1.0).steps(geometry)[0].needs)
    kind_of = Signal("cls_row") if geometry.has_cls else Signal("received")
    for number, pair in enumerate(zip(layers[early], layers[late])):
        cells = torch.cartesian_prod(torch.arange(1), torch.arange(6), torch.arange(6))
        scores = [layer.signal(kind_of) for layer in pair]
        expected += [number * 36 + i for i in slow(*scores, cells, keep, 3, geometry.has_cls)]
    assert image["retained"] == expected


def test_the_budget_is_what_the_llm_layer_leaves():
    model, batch = model_of("llava"), batch_of("llava", ((4, Shot(96, 96), 6),))
    for settings, left in (
        ({"keep": 7}, (21, 7)),
        ({"keep": 20}, (36, 20)),
        ({"keep": 7, "ratio": 0.5}, (14, 7)),
        ({"average_keep": 12}, (21, 7)),
    ):
        with torch.no_grad(), vtr.reduced(model, VScan(**settings, layer=2)) as reduction:
            model(**batch.inputs)
            (image,) = reduction.report().to_dict()["images"]
        assert (image["per_layer"][0], image["per_layer"][-1]) == left


def test_the_published_settings_are_the_defaults():
    deep = replace(LLAVA, tower_layers=24, feature_layer=22, llm_layers=32, patch_grid=(24, 24), most_tokens=576)
    merge, prune = VScan().steps(deep)
    assert [need.layer for need in merge.needs] == [5, 22] and prune.layer == 16 and merge.multiple == pytest.approx(3)
    assert VScan().budget == Budget(keep_ratio=32 / 576)
    qwen = replace(SIGLIP, host="qwen2_5_vl", tower_layers=32, llm_layers=28, joins=4)
    merge, prune = VScan().steps(qwen)
    assert [need.layer for need in merge.needs] == [7, 31] and prune.layer == 14


def test_mistakes():
    assert [step.action for step in VScan(ratio=1.0).steps(LLAVA)] == ["merge"]
    with pytest.raises(ValueError, match="ratio must be above 0 and at most 1, got 0"):
        VScan(ratio=0.0)
    with pytest.raises(ValueError, match="window must be 1 or more, got 0"):
        VScan(window=0)
    with pytest.raises(ValueError, match="shallow must be a tower layer, 0 or more, got -1"):
        VScan(shallow=-1)
    with pytest.raises(ValueError, match="shallow=9 is not one of the tower's layers 0 to 5"):
        VScan(shallow=9).steps(LLAVA)
    with pytest.raises(ValueError, match="layer 8 is out of range"):
        VScan(layer=8).steps(LLAVA)
