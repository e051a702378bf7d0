from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vtr
from scripts.replay.globalcom2 import authors_counts, authors_sequence
from tests.methods.handmade import (
    GRID,
    IMAGES,
    LLAVA,
    NEXT,
    ONE,
    SIGLIP,
    cells_of,
    chosen,
    images_of,
    last_cls_logits,
    make_view,
    retained,
    select_without_sync,
    shortened,
)
from tests.tiny_models import batch_of
from vtr.methods.globalcom2 import GlobalCom2, crop_shares, similarity_scores
from vtr.ops.canvas import valid_region
from vtr.ops.topk import quota

MORE = [((2, 3), (60, 60)), ((1, 4), (20, 300)), ((7, 1), (200, 20)), ((2, 2), (96, 96))]


def logits_of(view, scale=2.0):
    """CLS logits that depend on the patch only."""
    return scale * torch.randn(3000, generator=torch.Generator().manual_seed(5))[view.patch]


def compressed(view, method=None, geometry=NEXT):
    (step,) = (method or GlobalCom2()).steps(geometry)
    view.signals = {need: logits_of(view) for need in step.needs}
    return step.select(view).keep


def slow(scores, image, keep, tau=10.0):
    """The algorithm for one image crop by crop, float64, with the library's interpolation. `scores (N,)` in the order of `cells_of`."""
    crop_grid, size = image
    cells, scores = cells_of(image), scores.double()
    if crop_grid == (0, 0):
        return sorted(scores.argsort(descending=True, stable=True)[:keep].tolist())
    rows, cols = GRID
    thumbnail = scores[: rows * cols].view(rows, cols)
    top, bottom, left, right = valid_region(size, crop_grid, GRID)
    spread = F.interpolate(thumbnail[None, None], (bottom - top, right - left), mode="bilinear", align_corners=False)[0, 0]
    down, across = max(rows // crop_grid[0], 1), max(cols // crop_grid[1], 1)
    sums, ranking, members = [], [scores[: rows * cols]], [torch.arange(rows * cols)]
    for j in range(crop_grid[0] * crop_grid[1]):
        i, k = divmod(j, crop_grid[1])
        low = rows if i == crop_grid[0] - 1 else (i + 1) * down
        far = cols if k == crop_grid[1] - 1 else (k + 1) * across
        sums.append(thumbnail[i * down : low, k * across : far].sum())
        own = (cells[:, 0] == j + 1).nonzero().flatten()
        y, x = i * rows + cells[own, 1] - top, k * cols + cells[own, 2] - left
        ranking.append(F.normalize(scores[own], dim=0) + F.normalize(spread[y, x], dim=0))
        members.append(own)
    sigma = ((torch.stack(sums) - max(sums)) / tau).exp()
    sigma = sigma / (sigma.sum() + 1e-8)
    share = torch.cat([torch.ones(1), 1 + sigma - sigma.mean()])
    size_of = torch.tensor([len(m) for m in members])
    counts = quota((share * size_of)[None], size_of[None], torch.tensor([keep]))[0]
    return sorted(i for m, r, c in zip(members, ranking, counts) for i in m[r.argsort(descending=True, stable=True)[:c]].tolist())


@pytest.mark.parametrize("images", [IMAGES, MORE, IMAGES + MORE], ids=["images", "more", "all"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.97])
def test_select_is_the_algorithm_for_every_image_of_a_ragged_batch(images, ratio):
    view = make_view(images, [round(ratio * len(cells_of(image))) for image in images], filler=2)
    kept = compressed(view)
    assert torch.equal(kept.sum(1), view.keep)
    for g, got in enumerate(chosen(view, kept)):
        assert got.tolist() == slow(logits_of(view)[g, view.real[g]], images[g], int(view.keep[g]))


@pytest.mark.parametrize("keep", [1, 2, 35])
def test_small_budgets_are_exact(keep):
    view = make_view(IMAGES + MORE, keep)
    assert torch.equal(compressed(view).sum(1), view.keep)


def test_all_tokens_can_stay():
    view = make_view(IMAGES, 10**6)
    assert torch.equal(compressed(view), view.real)


def test_batch_and_padding_change_nothing():
    together = make_view(IMAGES, 12)
    for method, geometry in ((GlobalCom2(), NEXT), (GlobalCom2(score="similarity"), SIGLIP)):
        kept = chosen(together, compressed(together, method, geometry))
        for image, expected in zip(IMAGES, kept):
            alone = make_view([image], 12, filler=5)
            assert torch.equal(chosen(alone, compressed(alone, method, geometry))[0], expected)


def test_order_of_tokens_does_not_matter():
    view = make_view(IMAGES, 12)
    kept = compressed(view)
    order = torch.randperm(view.real.shape[1], generator=torch.Generator().manual_seed(0))
    moved = replace(view, **{name: getattr(view, name)[:, order] for name in ("tokens", "real", "cells", "patch", "sizes")})
    assert torch.equal(compressed(moved), kept[:, order])


def test_a_single_view_keeps_its_own_best():
    view = make_view([ONE, ONE], [5, 9])
    best = logits_of(view)[0].topk(9).indices
    kept = chosen(view, compressed(view, geometry=LLAVA))
    assert kept[0].tolist() == sorted(best[:5].tolist()) and kept[1].tolist() == sorted(best.tolist())


def test_the_crop_under_the_bright_block_keeps_most():
    view = make_view([((2, 2), (96, 96))], 40)
    bright = (view.cells[..., 0] == 0) & (view.cells[..., 1] >= 3) & (view.cells[..., 2] < 3)  # third crop
    (step,) = GlobalCom2(temperature=1.0).steps(NEXT)
    view.signals = {step.needs[0]: logits_of(view, 0.1) + 3 * bright}
    per_view = torch.bincount(view.cells[0, :, 0][step.select(view).keep[0]], minlength=5)
    assert per_view[3] == per_view[1:].max() and per_view[3] > per_view[[1, 2, 4]].max()
    assert abs(int(per_view[0]) - 40 // 5) <= 1


def test_even_allocation_asks_no_thumbnail():
    view = make_view([((2, 2), (96, 96))], 40)
    bright = (view.cells[..., 0] == 0) & (view.cells[..., 1] >= 3) & (view.cells[..., 2] < 3)
    (step,) = GlobalCom2(allocation="even").steps(NEXT)
    view.signals = {step.needs[0]: logits_of(view, 0.1) + 3 * bright}
    assert torch.bincount(view.cells[0, :, 0][step.select(view).keep[0]], minlength=5).tolist() == [8] * 5


def test_shares_of_absent_crops_are_zero_and_the_mean_is_one():
    sums = torch.tensor([[1.0, 50.0, 3.0, 2.0], [5.0, 1.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    share = crop_shares(sums, torch.tensor([[4], [2], [1], [0]]), 10.0)
    assert share[1, 2:].tolist() == [0, 0] and share[3].tolist() == [0] * 4 and share[2, 0] == pytest.approx(1)
    torch.testing.assert_close(share[:2].sum(1), torch.tensor([4.0, 2.0], dtype=torch.float64))
    assert share[0].argmax() == 1


def test_similarity_scores_are_minus_the_cosine_to_the_mean_of_the_view():
    view = make_view(IMAGES[:2], 9, filler=3)
    got = similarity_scores(view.tokens, view.cells, view.real, 5)
    for g in range(2):
        for v in range(5 if g == 0 else 1):
            own = view.real[g] & (view.cells[g, :, 0] == v)
            x = view.tokens[g, own].double()
            torch.testing.assert_close(got[g, own].double(), -F.cosine_similarity(x, x.mean(0, keepdim=True)), atol=1e-6, rtol=0)


def test_missing_tokens_are_refused_with_the_order_that_works():
    view = make_view(IMAGES, 9)
    short = shortened(view, view.real & (torch.arange(view.real.shape[1]) != view.real.shape[1] - 1))
    with pytest.raises(vtr.VtrError, match="put globalcom2 first in the plan"):
        compressed(short)
    single = make_view([ONE], 9)
    assert compressed(shortened(single, torch.arange(36)[None] < 20), geometry=LLAVA).sum() == 9


def test_an_unknown_image_size_is_no_obstacle():
    view = make_view(IMAGES, 9)
    expected = compressed(view)
    assert torch.equal(compressed(replace(view, image_sizes=[(0, 0)] * 4)), expected)


def test_authors_counts_cut_down_and_never_exceed_the_crop():
    got = authors_counts(torch.tensor([[1.8, 0.6]], dtype=torch.float64), torch.tensor([[100, 77]]), 0.7)
    assert got.tolist() == [[100, 32]]


def test_authors_sequence_without_padding_is_the_true_layout():
    image = ((2, 2), (96, 96))
    cells, random = cells_of(image), torch.Generator().manual_seed(0)
    score, keep = torch.randn(len(cells), generator=random), torch.rand(len(cells), generator=random) < 0.3
    ours = authors_sequence(keep, score, cells, image[0], GRID)
    assert torch.equal(ours, authors_sequence(keep, score, cells, image[0], GRID, true_cells=True))
    assert int((ours < 0).sum()) == 12 and sorted(ours[ours >= 0].tolist()) == keep.nonzero().flatten().tolist()
    thumbnail = ours[: int(keep[:36].sum())]
    assert score[thumbnail].tolist() == sorted(score[:36][keep[:36]].tolist(), reverse=True)


@pytest.mark.parametrize("geometry", [NEXT, SIGLIP], ids=["cls", "similarity"])
def test_selections_never_wait_for_the_device(geometry):
    view = make_view(IMAGES, 9)
    (step,) = GlobalCom2().steps(geometry)
    view.signals = {need: logits_of(view) for need in step.needs}
    select_without_sync(step, view)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@torch.no_grad()
def test_on_a_model_it_is_the_algorithm_on_the_logits_of_the_last_tower_layer(kind):
    batch = batch_of(kind, dtype=torch.float64)
    expected = []
    for seen in images_of(batch):
        logits = last_cls_logits(batch, seen.pixels)[..., 1:].mean(1).flatten()
        expected.append(sorted(seen.patch[slow(logits[seen.patch], seen.image, 19)].tolist()))
    assert retained(batch, GlobalCom2(keep=19)) == expected


def test_signals_and_errors():
    (step,) = GlobalCom2().steps(NEXT)
    assert (step.needs[0].kind, step.needs[0].layer, step.needs[0].softmax) == ("cls_row", NEXT.tower_layers - 1, False)
    assert not GlobalCom2().steps(SIGLIP)[0].needs and not GlobalCom2(score="similarity").steps(NEXT)[0].needs
    with pytest.raises(vtr.VtrError, match="use score='similarity'"):
        GlobalCom2(score="cls").steps(SIGLIP)
    with pytest.raises(vtr.VtrError, match="leave compat out"):
        GlobalCom2(compat="authors").steps(NEXT)
    with pytest.raises(ValueError, match="score must be 'auto', 'cls' or 'similarity', got 'siglip'"):
        GlobalCom2(score="siglip")
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        GlobalCom2(temperature=0)
    with pytest.raises(ValueError, match="allocation must be 'thumbnail' or 'even', got 'equal'"):
        GlobalCom2(allocation="equal")
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        GlobalCom2(compat="yes")
