"""The grid that a smaller input image gets, against a search over all grids."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.views import grid_cells, view_of
from vtr.methods.resize import Resize, resized_grid, resized_tokens
from vtr.types import Geometry

sides = st.integers(1, 12)


def proportional(grid: tuple[int, int]) -> set[tuple[int, int]]:
    """All (r, c) with r and c rounded down or up from s R and s C for some s in (0, 1], sampled finely."""
    rows, cols = grid
    found = set()
    for step in range(1, 20 * rows * cols + 1):
        r, c = step * rows / (20 * rows * cols), step * cols / (20 * rows * cols)
        found |= {(a, b) for a in (math.floor(r), math.ceil(r)) for b in (math.floor(c), math.ceil(c)) if a and b}
    return found


@given(sides, sides, st.integers(1, 150))
def test_no_nearly_proportional_grid_within_the_budget_is_larger(rows: int, cols: int, keep: int) -> None:
    r, c = resized_grid((rows, cols), keep)
    assert r * c <= keep and 1 <= r <= rows and 1 <= c <= cols
    assert r * c >= max(a * b for a, b in proportional((rows, cols)) if a * b <= keep)


def test_examples() -> None:
    assert [resized_grid((24, 24), keep) for keep in (576, 192, 64, 9, 8, 1)] == [(24, 24), (13, 14), (8, 8), (3, 3), (2, 3), (1, 1)]
    assert resized_grid((24, 24), 10**6) == (24, 24)
    assert resized_grid((12, 24), 72) == (6, 12)


@given(st.integers(5, 2880), st.sampled_from([(2, 2), (1, 3), (3, 1)]), st.integers(30, 900), st.integers(30, 900))
def test_anyres_counts_what_survives_unpadding(keep: int, crops: tuple[int, int], height: int, width: int) -> None:
    grid = resized_grid((24, 24), keep, crops, (height, width))
    tokens = resized_tokens(grid, (24, 24), crops, (height, width))
    assert tokens <= keep
    larger = [g for g in ((grid[0] + 1, grid[1]), (grid[0], grid[1] + 1)) if max(g) <= 24 and abs(g[0] - g[1]) <= 1]
    counts = [resized_tokens(g, (24, 24), crops, (height, width)) for g in larger]
    assert all(count > keep or count <= tokens for count in counts)


def test_unpadding_is_that_of_llava_next() -> None:
    full = (24, 24)
    assert resized_tokens(full, full, (2, 2), (480, 640)) == 576 + 36 * 48
    assert resized_tokens(full, full, (2, 2)) == 5 * 576
    assert resized_tokens(full, full) == 576
    assert resized_tokens((12, 12), full, (2, 2), (480, 640)) == 144 + 18 * 24
    assert resized_tokens((2, 1), full, (1, 3), (100, 1000)) == 2, "a strip between the centres of both rows"


def test_every_image_gets_its_own_grid() -> None:
    (step,) = Resize().steps(Geometry("test", 4, 2, 1, True, (6, 6), 5, 180))
    assert step.select is not None and (step.stage, step.action) == ("input", "input")
    cells, crops, sizes = [grid_cells(6, 6), grid_cells(6, 6, views=3)], [(0, 0), (1, 2)], [(0, 0), (60, 120)]
    assert step.select(view_of(cells, [9, 30], (6, 6), crops, sizes)) == [(3, 3), (3, 3)]


def test_a_budget_below_one_token_per_view_is_refused() -> None:
    with pytest.raises(ValueError, match="resize: keep must be at least 5, one token per view of this image, got 4"):
        resized_grid((24, 24), 4, (2, 2), (100, 100))
