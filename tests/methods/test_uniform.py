"""Evenly spaced tokens, against the formula in plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.views import grid_cells, view_of
from vtr.methods.uniform import Uniform
from vtr.ops.spaced import evenly_spaced
from vtr.types import Geometry


def spaced(n: int, keep: int) -> list[int]:
    return [((2 * i + 1) * n) // (2 * keep) for i in range(keep)]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4))
def test_index_is_floor_of_i_and_a_half_times_n_over_k(rows: list[tuple[int, int]]) -> None:
    counts = [n for n, _ in rows]
    keep = [min(n, k) for n, k in rows]
    real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    mask = evenly_spaced(real, torch.tensor(keep))
    for row, (n, k) in enumerate(zip(counts, keep, strict=True)):
        assert mask[row].nonzero()[:, 0].tolist() == spaced(n, k)


@given(st.lists(st.booleans(), min_size=1, max_size=20).filter(any), st.integers(1, 20))
def test_holes_are_not_counted(real: list[bool], keep: int) -> None:
    present = [i for i, r in enumerate(real) if r]
    keep = min(keep, len(present))
    mask = evenly_spaced(torch.tensor([real]), torch.tensor([keep]))
    assert mask[0].nonzero()[:, 0].tolist() == [present[i] for i in spaced(len(present), keep)]


def test_thumbnail_first_then_canvas() -> None:
    view = view_of([grid_cells(4, 4, views=3)], [6], (4, 4), crop_grids=[(1, 2)])
    (step,) = Uniform().steps(Geometry("test", 4, 2, 1, True, (4, 4), 5, 80))
    assert step.select is not None
    assert step.select(view).keep[0].nonzero()[:, 0].tolist() == [4, 12, 20, 28, 36, 44]
