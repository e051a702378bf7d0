"""HiPrune against a loop of the card, and on real towers."""

from dataclasses import replace

import pytest
import torch

import vtr
from tests.methods.handmade import LLAVA, NEXT, ONE, SIGLIP, chosen, make_view, select_without_sync
from tests.methods.towers import layers_of, random_layer, tower_view
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.hiprune import HiPrune, anchor_count, hiprune, neighbours, raster_neighbours
from vtr.types import Budget, Signal

GRIDS = [(6, 6), (4, 5), (1, 1), (1, 7), (7, 1)]


def slow(shallow, deep, cells, keep, alpha):
    """The card for one image in plain Python; `cells` are (view, row, column) of the real tokens."""
    number, n = round(keep * alpha / 5), len(cells)
    places = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    near = []
    for anchor in sorted(range(n), key=lambda i: (-float(shallow[i]), i))[:number]:
        view, row, col = cells[anchor].tolist()
        around = [(view, row, col), (view, row, col - 1), (view, row, col + 1), (view, row - 1, col), (view, row + 1, col)]
        near += [places[cell] for cell in around if cell in places and places[cell] not in near]
    near = near[:keep]
    rest = sorted((i for i in range(n) if i not in near), key=lambda i: (-float(deep[i]), i))
    return sorted(near + rest[: keep - len(near)])


def authors(shallow, deep, cols, keep, alpha):
    """The released code for one image: neighbours in the raster order, ended at its first and last token."""
    n = len(shallow)
    anchors = sorted(range(n), key=lambda i: (-float(shallow[i]), i))[: round(keep * alpha / 5)]
    near = {min(max(a + step, 0), n - 1) for a in anchors for step in (0, -1, 1, -cols, cols)}
    rest = sorted((i for i in range(n) if i not in near), key=lambda i: (-float(deep[i]), i))
    return sorted([*near, *rest[: keep - len(near)]])


def view_with(method, view, seed=0, geometry=LLAVA):
    """The View with random scores of both layers, the same for the same image."""
    (step,) = method.steps(geometry)
    for number, need in enumerate(step.needs):
        score = torch.full(view.real.shape, 9.0)
        for g, real in enumerate(view.real):
            n = int(real.sum())
            score[g, real] = torch.rand(n, generator=torch.Generator().manual_seed(1000 * seed + 100 * number + n))
        view.signals = {**view.signals, need: score}
    return step, view


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("keep", [1, 3, 8, 13, 35, 36, [36, 19, 1, 6, 3], [18, 13, 1, 2, 7]])
def test_rows_of_a_ragged_batch_are_the_card(keep, behind, alpha):
    method = HiPrune(alpha=alpha)
    step, view = view_with(method, make_view([ONE] * 5, keep, grid=GRIDS, filler=4, behind=behind))
    kept = step.select(view).keep
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    for g, got in enumerate(chosen(view, kept)):
        scores = [view.signals[need][g, view.real[g]] for need in step.needs]
        count = int(view.keep[g])
        assert got.tolist() == slow(scores[0], scores[-1], view.cells[g, view.real[g]], count, alpha)
        _, alone = view_with(method, make_view([ONE], count, grid=GRIDS[g]))
        assert torch.equal(chosen(alone, step.select(alone).keep)[0], got)


@pytest.mark.parametrize("keep", [9, 40, [70, 35, 99, 30]])
def test_neighbours_stay_inside_their_view_and_out_of_the_padding(keep):
    method = HiPrune(alpha=0.8)  # images of several views in one row, as a video with frames='all' has them
    step, view = view_with(method, make_view(keep=keep, filler=2), geometry=NEXT)
    kept = chosen(view, step.select(view).keep)
    for g, got in enumerate(kept):
        scores = [view.signals[need][g, view.real[g]] for need in step.needs]
        assert got.tolist() == slow(*scores, view.cells[g, view.real[g]], int(view.keep[g]), 0.8)


def test_neighbours_of_a_row_end_and_of_a_corner():
    view = make_view([ONE], 1, grid=(2, 3))
    found = neighbours(view.cells, view.real, 1, (2, 3))[0].tolist()
    assert found[0] == [6, 1, 6, 3] and found[2] == [1, 6, 6, 5] and found[4] == [3, 5, 1, 6]
    assert raster_neighbours(1, 6, 3)[0].tolist()[2] == [1, 3, 0, 5]  # wraps to the next row, ends at the first token


@pytest.mark.parametrize("keep", [1, 13, 25, 35, 36])
def test_compat_has_the_neighbours_of_the_code(keep):
    method = HiPrune(alpha=0.5, compat="authors")
    step, view = view_with(method, make_view([ONE, ONE], keep), seed=keep)
    for g, got in enumerate(chosen(view, step.select(view).keep)):
        scores = [view.signals[need][g] for need in step.needs]
        assert got.tolist() == authors(*scores, 6, keep, 0.5)


def test_compat_is_refused_where_it_keeps_fewer():
    for geometry in (NEXT, SIGLIP, replace(LLAVA, tiles=True)):
        with pytest.raises(vtr.VtrError, match="compat='authors' keeps fewer tokens than asked for"):
            HiPrune(compat="authors").steps(geometry)
    step, view = view_with(HiPrune(compat="authors"), make_view([ONE, ONE], 9, grid=[(6, 6), (4, 5)]))
    with pytest.raises(vtr.VtrError, match="needs whole images of one grid"):
        step.select(view)


def test_the_number_of_anchors_is_rounded_half_to_even():
    assert [anchor_count(keep, 0.1) for keep in (192, 128, 64, 25, 75, 24)] == [4, 3, 1, 0, 2, 0]


def test_scores_without_a_number_come_last():
    shallow = deep = torch.tensor([[torch.nan, 0.1, 0.3, torch.nan]])
    beside, real = torch.full((1, 4, 4), 4), torch.ones(1, 4, dtype=torch.bool)
    kept, near = hiprune(shallow, deep, beside, real, torch.tensor([3]), torch.tensor([1]), 1)
    assert kept[0].tolist() == [True, True, True, False] and near[0].tolist() == [False, False, True, False]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_selections_never_wait_for_the_device(alpha):
    step, view = view_with(HiPrune(alpha=alpha), make_view([ONE] * 5, [9, 2, 1, 3, 7], grid=GRIDS))
    select_without_sync(step, view)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 12, 35])
def test_on_a_model_every_view_keeps_what_the_card_says(kind, keep):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))  # no padding: all views get the same share
    with torch.no_grad(), vtr.reduced(model, "hiprune", keep_ratio=keep / 36, alpha=0.6) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    layers, expected = layers_of(model, batch), []
    middle = HiPrune().steps(reduction.host.geometry())[0].needs[0].layer
    for number, (early, late) in enumerate(zip(layers[middle], layers[reduction.host.feature_layers[0]])):
        scores = [layer.signal(Signal("received")) for layer in (early, late)]
        cells = torch.cartesian_prod(torch.arange(1), torch.arange(6), torch.arange(6))
        expected += [number * 36 + i for i in slow(*scores, cells, keep, 0.6)]
    assert image["retained"] == expected


def test_layers_are_at_the_published_depth():
    for geometry, layer in (
        (replace(LLAVA, tower_layers=24), 8),
        (replace(SIGLIP, tower_layers=32), 15),
        (replace(LLAVA, tower_layers=1), 0),
    ):
        early, late = (HiPrune().steps(geometry)[0].needs * 2)[:2]
        assert early.layer == layer and late.layer in (geometry.feature_layer, layer)
    assert HiPrune(layer=3).steps(LLAVA)[0].needs[0] == Signal("received", layer=3, tower=True)
    assert HiPrune(alpha=0.0).steps(LLAVA)[0].needs == (Signal("received", layer=LLAVA.feature_layer, tower=True),)


def test_defaults_and_mistakes():
    assert HiPrune().budget == Budget(keep_ratio=1 / 3)
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 2"):
        HiPrune(alpha=2.0)
    with pytest.raises(ValueError, match="layer must be a tower layer, 0 or more, got -1"):
        HiPrune(layer=-1)
    with pytest.raises(ValueError, match="layer=9 is not one of the tower's layers 0 to 5"):
        HiPrune(layer=9).steps(LLAVA)
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        HiPrune(compat="paper")


def test_the_same_layer_twice_is_one_signal():
    (step,) = HiPrune(layer=LLAVA.feature_layer).steps(LLAVA)
    assert len(step.needs) == 1
    view = tower_view(step, [random_layer(36)], 9, cells=[torch.cartesian_prod(torch.arange(1), torch.arange(6), torch.arange(6))])
    assert step.select(view).keep.sum() == 9
