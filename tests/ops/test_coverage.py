"""Greedy coverage against the definition in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vtr.ops.blocks import all_at_once
from vtr.ops.coverage import greedy_coverage

pytestmark = pytest.mark.usefixtures("both_ways")


def score(matrix: Tensor, covered: list[float], j: int, weight: Tensor, bonus: Tensor) -> float:
    """Gain times weight plus bonus of a column."""
    gain = sum(max(0.0, float(matrix[r, j]) - c) for r, c in enumerate(covered))
    return gain * float(weight[j]) + float(bonus[j])


def greedy(matrix: Tensor, columns: list[int], count: int, weight: Tensor, bonus: Tensor, first: list[int]) -> list[int]:
    """Pick after pick, the column with which the maxima of the rows grow most."""
    covered = [0.0] * matrix.shape[0]
    picked: list[int] = []
    while len(picked) < count:
        left = [j for j in columns if j not in picked]
        left = [j for j in left if j in first] or left
        scores = [(score(matrix, covered, j, weight, bonus), -j) for j in left]
        picked.append(-max(scores)[1])
        covered = [max(c, float(matrix[r, picked[-1]])) for r, c in enumerate(covered)]
    return picked


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 6), st.booleans(), st.booleans())
def test_picks_are_the_greedy_ones(seed: int, n: int, rows: int, few_values: bool, preferred: bool) -> None:
    dice = torch.Generator().manual_seed(seed)
    matrix = torch.randn(1, rows, n, generator=dice, dtype=torch.float64)
    weight, bonus = torch.rand(1, n, generator=dice, dtype=torch.float64), torch.rand(1, n, generator=dice, dtype=torch.float64)
    if few_values:  # sums without rounding, many ties
        matrix, weight, bonus = matrix.sign(), torch.ones_like(weight), torch.zeros_like(bonus)
    real, first = torch.rand(1, n, generator=dice) < 0.8, torch.rand(1, n, generator=dice) < 0.5
    real[0, 0] = True
    columns = real[0].nonzero()[:, 0].tolist()
    picks, scores = greedy_coverage(matrix, real, len(columns), weight=weight, bonus=bonus, first=first if preferred else None)
    chosen = first[0].nonzero()[:, 0].tolist() if preferred else []
    assert picks[0].tolist() == greedy(matrix[0], columns, len(columns), weight[0], bonus[0], chosen)
    assert scores.isfinite().all()


def test_scores_are_what_is_gained() -> None:
    matrix = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, scores = greedy_coverage(matrix, torch.ones(2, 5, dtype=torch.bool), 5)
    torch.testing.assert_close(scores.sum(1), matrix.amax(2).sum(1))
    assert (scores[:, 1:] <= scores[:, :-1] + 1e-12).all(), "gains fall: coverage is submodular"


def test_rows_of_a_batch_and_zero_rows_do_not_matter() -> None:
    matrix = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = torch.ones(3, 8, dtype=torch.bool)
    picks, _ = greedy_coverage(matrix, real, 8)
    for g in range(3):
        wider = torch.cat([matrix[g : g + 1], torch.zeros(1, 4, 8, dtype=torch.float64)], 1)
        assert torch.equal(greedy_coverage(wider, real[:1], 5)[0], picks[g : g + 1, :5])


def test_equal_columns_go_by_index_and_a_row_that_runs_out_stays_in_range() -> None:
    real = torch.tensor([[True, True, True], [False, True, False]])
    picks, _ = greedy_coverage(torch.ones(2, 4, 3), real, 3)
    assert picks[0].tolist() == [0, 1, 2] and picks[1, 0] == 1 and picks[1].max() < 3


def test_gradients_and_devices_do_not_get_in_the_way() -> None:
    matrix = torch.rand(1, 4, 4, requires_grad=True)
    picks, _ = greedy_coverage(matrix, torch.ones(1, 4, dtype=torch.bool), 2)
    assert picks.shape == (1, 2)
    with all_at_once(), FakeTensorMode():  # anything that waits for a value raises
        greedy_coverage(torch.empty(2, 5, 6), torch.empty(2, 6, dtype=torch.bool), 3, weight=torch.empty(2, 6))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_old_scores_are_bounds_of_many_columns(seed: int, few_values: bool, preferred: bool) -> None:
    """More columns than are brought up to date at a time, with and without ties."""
    dice = torch.Generator().manual_seed(seed)
    matrix = torch.randn(1, 20, 90, generator=dice, dtype=torch.float64)
    weight, bonus = torch.rand(1, 90, generator=dice, dtype=torch.float64), torch.rand(1, 90, generator=dice, dtype=torch.float64)
    if few_values:
        matrix, weight, bonus = matrix.sign(), torch.ones_like(weight), torch.zeros_like(bonus)
    real, first = torch.rand(1, 90, generator=dice) < 0.8, torch.rand(1, 90, generator=dice) < 0.1
    picks, _ = greedy_coverage(matrix, real, 12, weight=weight, bonus=bonus, first=first if preferred else None)
    chosen = (first & real)[0].nonzero()[:, 0].tolist() if preferred else []
    assert picks[0].tolist() == greedy(matrix[0], real[0].nonzero()[:, 0].tolist(), 12, weight[0], bonus[0], chosen)
