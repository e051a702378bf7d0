"""HiRED against a brute force of the paper with the geometry of LLaVA-NeXT, and on real towers."""

from dataclasses import replace

import pytest
import torch

import vtr
from scripts.replay.hired import authors_budgets, authors_sequence, authors_totals, paper_budgets
from tests.methods.handmade import GRID, IMAGES, LLAVA, NEXT, ONE, SIGLIP, cells_of, chosen, make_view, select_without_sync
from tests.methods.towers import layers_of
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.hired import HiRED
from vtr.ops.canvas import block_sums, shown_blocks, valid_region
from vtr.ops.topk import quota
from vtr.types import Budget, Signal

MORE = [((2, 3), (60, 60)), ((1, 4), (20, 300)), ((7, 1), (200, 20)), ((2, 2), (96, 96)), ((5, 1), (240, 48))]


def attention_of(signal, view):
    """CLS attention that depends on layer and patch only."""
    return torch.rand(3000, generator=torch.Generator().manual_seed(signal.layer))[view.patch]


def selected(view, method=None, geometry=NEXT):
    (step,) = (method or HiRED()).steps(geometry)
    view.signals = {need: attention_of(need, view) for need in step.needs}
    return step.select(view).keep


def slow_scores(early, image, region=None):
    """Attention on the part of the thumbnail that each crop shows, by the centres of its patches; `early (rows * cols)` of the thumbnail."""
    (rows, cols), size = image
    top, bottom, left, right = region or valid_region(size, (rows, cols), GRID)
    sums = [0.0] * (rows * cols)
    for r in range(GRID[0]):
        for c in range(GRID[1]):
            y = top + (r + 0.5) / GRID[0] * (bottom - top)
            x = left + (c + 0.5) / GRID[1] * (right - left)
            sums[int(y / GRID[0]) * cols + int(x / GRID[1])] += float(early[r * GRID[1] + c])
    return sums


def slow(early, late, image, keep, alpha=0.5):
    """One image: kept places in the order of `cells_of`."""
    view = cells_of(image)[:, 0]
    capacity = torch.bincount(view, minlength=image[0][0] * image[0][1] + 1)
    full = min(int(keep * alpha), int(capacity[0]))
    rest = min(keep - full, int(capacity[1:].sum()))
    budgets = [keep - rest]
    if len(capacity) > 1:
        budgets += quota(torch.tensor([slow_scores(early, image)]), capacity[None, 1:], torch.tensor([rest]))[0].tolist()
    kept = []
    for v, budget in enumerate(budgets):
        own = (view == v).nonzero().flatten()
        kept += own[late[own].argsort(descending=True, stable=True)[:budget]].tolist()
    return sorted(kept)


@pytest.mark.parametrize("images", [IMAGES, MORE, IMAGES + MORE], ids=["images", "more", "all"])
@pytest.mark.parametrize("ratio", [0.02, 0.2, 0.6, 0.97])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_select_is_the_paper_for_every_image_of_a_ragged_batch(images, ratio, alpha):
    view = make_view(images, [max(round(ratio * len(cells_of(image))), 1) for image in images], filler=2)
    kept = selected(view, HiRED(alpha=alpha))
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    for g, got in enumerate(chosen(view, kept)):
        early, late = (attention_of(Signal("cls_row", layer=i), view)[g, view.real[g]] for i in (0, NEXT.feature_layer))
        assert got.tolist() == slow(early, late, images[g], int(view.keep[g]), alpha)


def test_every_budget_is_exact():
    for keep in range(1, 200):
        view = make_view(IMAGES, keep)
        assert torch.equal(selected(view).sum(1), view.keep)
    everything = make_view(IMAGES, 10**6)
    assert torch.equal(selected(everything), everything.real)


def test_batch_and_padding_change_nothing():
    together = make_view(IMAGES, 12)
    kept = chosen(together, selected(together))
    for image, expected in zip(IMAGES, kept):
        alone = make_view([image], 12, filler=5)
        assert torch.equal(chosen(alone, selected(alone))[0], expected)


def test_the_crop_that_is_looked_at_gets_the_budget():
    view = make_view([((2, 2), (96, 96)), ((1, 3), (48, 144))], 40)
    (step,) = HiRED().steps(NEXT)
    corner = (view.cells[..., 0] == 0) & (view.cells[..., 1] >= 3) & (view.cells[..., 2] < 3)  # the third of four crops
    right = (view.cells[..., 0] == 0) & (view.cells[..., 2] >= 4)  # the third of three
    bright = torch.stack([corner[0], right[1]])
    view.signals = {step.needs[0]: bright.float(), step.needs[1]: attention_of(step.needs[1], view)}
    kept = step.select(view).keep
    for g in range(2):
        assert torch.bincount(view.cells[g, :, 0][kept[g]], minlength=5).tolist() == [20, 0, 0, 20, 0]


def test_an_unpadded_region_moves_the_blocks():
    """A wide image on a 2 x 2 canvas leaves its middle only: the upper half of the thumbnail belongs to the upper crops all the same."""
    early = torch.rand(1, *GRID)
    for region in ((0, 12, 0, 12), (3, 9, 0, 12), (0, 12, 5, 7), (4, 12, 0, 12)):
        got = block_sums(early, torch.tensor([shown_blocks((2, 2), GRID, region, 4, 6)]))
        torch.testing.assert_close(got[0], torch.tensor(slow_scores(early.flatten(), ((2, 2), (1, 1)), region), dtype=torch.float64))
    assert got.sum() == pytest.approx(float(early.sum()))


def test_the_whole_canvas_where_the_image_size_is_unknown():
    view = make_view([((2, 2), (96, 96))], 40)
    known = selected(view)
    view.image_sizes = [(0, 0)]
    assert torch.equal(selected(view), known)


def test_of_a_thumbnail_with_holes_what_is_left_counts():
    view = make_view([((2, 2), (96, 96))], 20)
    view.real = view.real & ~((view.cells[..., 0] == 0) & (view.cells[..., 1] > 0))
    assert selected(view).sum() == 20


def test_one_view_keeps_its_own_best():
    view = make_view([ONE, ONE], [5, 9])
    kept = selected(view, geometry=LLAVA)
    best = attention_of(Signal("cls_row", layer=LLAVA.feature_layer), view)[0].topk(9).indices
    assert chosen(view, kept)[0].tolist() == sorted(best[:5].tolist())
    assert torch.equal(kept, selected(view, HiRED(compat="authors"), LLAVA))


def test_the_released_stitching_throws_real_tokens_away():
    mask = torch.ones(4, 36, dtype=torch.bool)
    sequence = authors_sequence(mask, (1, 3), (48, 144), GRID)  # three crops side by side, no padding at all
    assert sequence[:36] == [(0, i) for i in range(36)]
    assert {view for view, _ in sequence[36:]} == {2} and len(sequence) < 36 * 4, "only a part of the middle crop is left"


def test_the_released_counts_are_those_of_strips_and_of_nothing_without_a_budget():
    early = torch.zeros(24 * 24)
    early[: 6 * 24] = 1.0  # the uppermost of four strips: half of the top two quadrants
    assert authors_budgets(early, 4, 100, 0.75).tolist() == [100, 0, 0, 0]
    assert authors_budgets(early, 4, 0, 1.0).tolist() == [0] * 4
    assert authors_totals(5, 576, 0.2, 0.5) == (288, 288) and authors_totals(5, 576, 0.9, 0.5) == (576, 2016)
    assert paper_budgets(torch.tensor([1.0, 2.0, 4.0]), 10, 576).tolist() == [1, 2, 5]


def test_selections_never_wait_for_the_device():
    view = make_view(IMAGES, 9)
    (step,) = HiRED().steps(NEXT)
    view.signals = {need: attention_of(need, view) for need in step.needs}
    select_without_sync(step, view)


def test_on_a_model_the_budget_follows_early_attention():
    model, batch = model_of("llava_next"), batch_of("llava_next", ((4, Shot(90, 40), 6),))
    with torch.no_grad(), vtr.reduced(model, "hired", keep=40) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    grid, size, layer = tuple(image["crop_grid"]), tuple(image["image_size"]), reduction.host.feature_layers[0]
    layers = layers_of(model, batch)
    cells = cells_of((grid, size))
    place = cells[:, 0] * 36 + cells[:, 1] * 6 + cells[:, 2]
    assert sorted(place.tolist()) == image["tokens"]
    row = Signal("cls_row")
    early = layers[0][0].signal(row)
    late = torch.cat([view.signal(row) for view in layers[layer]])[place]
    assert image["retained"] == sorted(place[slow(early, late, (grid, size), 40)].tolist())


def test_signals_and_errors():
    (step,) = HiRED(early=1).steps(NEXT)
    assert [(need.layer, need.tower) for need in step.needs] == [(1, True), (NEXT.feature_layer, True)]
    assert len(HiRED().steps(LLAVA)[0].needs) == 1, "one view shares nothing out"
    assert HiRED().budget == Budget(keep_ratio=0.2) and HiRED.published_positions == "renumber"
    assert HiRED().steps(SIGLIP)[0].needs[0].kind == "cls_row", "refused by the plan, since there is no CLS"
    with pytest.raises(vtr.VtrError, match="leave compat out"):
        HiRED(compat="authors").steps(NEXT)
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 2"):
        HiRED(alpha=2)
    with pytest.raises(ValueError, match="early must be a tower layer, 0 or more, got -1"):
        HiRED(early=-1)
    with pytest.raises(ValueError, match="early=6 is not one of the tower's layers 0 to 5"):
        HiRED(early=6).steps(replace(NEXT, tower_layers=6))
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        HiRED(compat="yes")
