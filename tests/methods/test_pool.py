"""Grid average pooling: exact counts, and adaptive average pooling where that exists."""

from dataclasses import asdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.views import grid_cells, one_row, view_of
from vtr.methods.pool import Pool, pool_cells
from vtr.types import Geometry, Selection, View

GEOMETRY = Geometry("test", 4, 2, 1, True, (6, 6), 5, 180)


def select(view: View) -> Selection:
    (step,) = Pool().steps(GEOMETRY)
    assert step.select is not None and step.action == "merge"
    return step.select(view)


def pooled(rows: int, cols: int, keep: int) -> tuple[View, Selection]:
    view = view_of([grid_cells(rows, cols)], [keep], (rows, cols))
    return view, select(view)


@pytest.mark.parametrize(
    ("rows", "cols", "down", "across"), [(24, 24, 8, 8), (24, 24, 10, 10), (24, 36, 6, 9), (7, 5, 7, 5), (13, 13, 4, 4), (9, 9, 1, 1)]
)
def test_it_is_adaptive_average_pooling_when_keep_is_a_grid_of_that_aspect(rows: int, cols: int, down: int, across: int) -> None:
    view, selection = pooled(rows, cols, down * across)
    image = view.tokens.view(1, rows, cols, -1).permute(0, 3, 1, 2)
    wanted = F.adaptive_avg_pool2d(image, (down, across)).flatten(2).mT[0]
    assert selection.tokens is not None and selection.keep is not None
    torch.testing.assert_close(selection.tokens[selection.keep], wanted, atol=1e-6, rtol=0)


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_every_count_is_exact_and_every_token_finds_a_pivot_whose_cell_holds_it(rows: int, cols: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, rows * cols))
    view, selection = pooled(rows, cols, keep)
    assert selection.keep is not None and selection.assign is not None and selection.tokens is not None
    assert selection.keep.sum() == keep
    kept = selection.keep[0]
    assert (selection.assign >= 0).all() and kept[selection.assign[0]].all()
    assert torch.equal(selection.assign[0][kept], kept.nonzero()[:, 0]), "a kept token names itself"
    if keep == rows * cols:
        assert torch.equal(selection.tokens, view.tokens), "nothing averaged: not touched, bit for bit"


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_bands_have_equal_height_and_c_or_c_plus_one_cells(rows: int, cols: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, rows * cols))
    number = torch.arange(keep)
    box, _ = pool_cells(torch.full_like(number, rows), torch.full_like(number, cols), torch.full_like(number, keep), number)
    bands = sorted({(top, bottom) for top, bottom in zip(*box[:2].tolist(), strict=True)})
    count = [sum(1 for top in box[0].tolist() if top == band[0]) for band in bands]
    assert sum(count) == keep and max(count) - min(count) <= 1 and max(count) <= cols
    for i, (top, bottom) in enumerate(bands):
        assert (top, bottom) == (Fraction(i * rows, len(bands)).__floor__(), Fraction((i + 1) * rows, len(bands)).__ceil__())
    covered = torch.zeros(rows, cols)
    for top, bottom, left, right in box.T.tolist():
        covered[top:bottom, left:right] += 1
    assert (covered >= 1).all(), "every token is in a cell"


def test_anyres_shares_the_budget_between_thumbnail_and_canvas() -> None:
    """A 2 x 1 canvas of 4 x 4 crops with the top and bottom row cut off by unpadding: 16 + 24 tokens."""
    thumbnail, crops = grid_cells(4, 4), grid_cells(4, 4, views=2) + torch.tensor([1, 0, 0])
    canvas_row = (crops[:, 0] - 1) * 4 + crops[:, 1]
    cells = torch.cat([thumbnail, crops[(canvas_row > 0) & (canvas_row < 7)]])
    view = view_of([cells], [10], (4, 4), crop_grids=[(2, 1)])
    selection = select(view)
    assert selection.keep is not None and selection.tokens is not None
    assert selection.keep[0, :16].sum() == 4 and selection.keep[0, 16:].sum() == 6
    for tokens, shape, cut in ((view.tokens[0, :16], (4, 4), slice(0, 16)), (view.tokens[0, 16:], (6, 4), slice(16, 40))):
        down = (2, 2) if shape == (4, 4) else (3, 2)
        wanted = F.adaptive_avg_pool2d(tokens.T.view(1, -1, *shape), down).flatten(2).mT[0]
        torch.testing.assert_close(selection.tokens[0, cut][selection.keep[0, cut]], wanted, atol=1e-6, rtol=0)


@given(st.integers(0, 10**6), st.integers(1, 36))
def test_counts_stay_exact_with_holes_and_weights(seed: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cells = grid_cells(6, 6)[torch.rand(36, generator=generator) < 0.5]
    if not len(cells):
        return
    keep = min(keep, len(cells))
    view = view_of([cells], [keep], (6, 6), pad=1)
    view.sizes = torch.randint(1, 4, view.sizes.shape, generator=generator).float()
    selection = select(view)
    assert selection.keep is not None and selection.assign is not None and selection.tokens is not None
    assert selection.keep.sum() == keep and not (selection.keep & ~view.real).any()
    assert selection.tokens.isfinite().all()
    named = selection.assign[0][view.real[0]]
    assert (named >= 0).all() and selection.keep[0][named].all()


def test_sizes_weigh_in() -> None:
    view = view_of([grid_cells(1, 2)], [1], (1, 2))
    view.sizes = torch.tensor([[3.0, 1.0]])
    selection = select(view)
    assert selection.tokens is not None and selection.keep is not None
    wanted: Tensor = (3 * view.tokens[0, 0] + view.tokens[0, 1]) / 4
    torch.testing.assert_close(selection.tokens[0][selection.keep[0]][0], wanted)


def test_rows_do_not_touch_each_other() -> None:
    crops = torch.cat([grid_cells(4, 4), grid_cells(4, 4, views=2) + torch.tensor([1, 0, 0])])
    view = view_of([grid_cells(4, 4), crops, grid_cells(4, 4)[:7]], [5, 11, 7], (4, 4), crop_grids=[(0, 0), (1, 2), (0, 0)], pad=2)
    together = select(view)
    assert together.keep is not None and together.tokens is not None and together.assign is not None
    assert together.keep.sum(1).tolist() == [5, 11, 7]
    for row, n in enumerate(view.counts):
        alone = select(one_row(view, row))
        assert alone.keep is not None and alone.tokens is not None and alone.assign is not None
        assert torch.equal(alone.keep[0], together.keep[row, :n]) and torch.equal(alone.assign[0], together.assign[row, :n])
        torch.testing.assert_close(alone.tokens[0][alone.keep[0]], together.tokens[row][together.keep[row]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("budget", [{"keep": 4}, {"keep_ratio": 0.5}])
def test_a_grid_and_a_budget_exclude_each_other(budget) -> None:
    with pytest.raises(ValueError, match=rf"pool: grid=\(3, 3\) says how many tokens stay, got {next(iter(budget))}="):
        Pool(grid=(3, 3), **budget)
    assert Pool(**asdict(Pool(grid=(3, 3)))) == Pool(grid=(3, 3))
