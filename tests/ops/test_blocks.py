"""Rows in blocks give what all of them at once give, and a CPU gets no more of them at a time than fit in its cache."""

from typing import NamedTuple

import pytest
import torch

from vtr.ops import blocks
from vtr.ops.blocks import all_at_once, in_blocks
from vtr.ops.coverage import greedy_coverage
from vtr.ops.dpp import greedy_dpp
from vtr.ops.gather import group_sums
from vtr.ops.maxsum import greedy_max_sum


class Pair(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch):
    """A decorated function, and how many rows each of its calls got, with room for 3 rows of 4 float32 and their bool."""
    monkeypatch.setattr(blocks, "CACHE", 3 * (4 * 4 + 1))
    rows: list[int] = []

    @in_blocks
    def bounds(values, real, shift, *, names=None):
        rows.append(len(values))
        return Pair(values.amin(1) + shift, torch.where(real, values.amax(1), 0))

    return bounds, rows


@pytest.mark.parametrize(("groups", "calls"), [(1, [1]), (3, [3]), (7, [3, 3, 1])])
def test_blocks_give_what_all_rows_at_once_give(seen, groups, calls):
    bounds, rows = seen
    values, real = torch.randn(groups, 4), torch.arange(groups) % 2 == 0
    got = bounds(values, real, 2.0, names=("a", "b"))
    assert rows == calls and isinstance(got, Pair)
    assert torch.equal(got.low, values.amin(1) + 2) and torch.equal(got.high, torch.where(real, values.amax(1), 0))


def test_a_row_larger_than_the_cache_goes_alone(monkeypatch):
    monkeypatch.setattr(blocks, "CACHE", 1)
    assert torch.equal(in_blocks(lambda values: values * 2)(values := torch.randn(5, 3)), values * 2)
    assert torch.equal(in_blocks(lambda *, values: (values, -values))(values=values)[1], -values)


def test_gradients_go_through_blocks(seen):
    bounds, rows = seen
    values = torch.randn(7, 4, requires_grad=True)
    bounds(values, torch.ones(7, dtype=torch.bool), 0).low.sum().backward()
    assert len(rows) == 3 and torch.equal(values.grad, torch.nn.functional.one_hot(values.argmin(1), 4).float())


def test_other_devices_get_all_rows_at_once(seen):
    bounds, rows = seen
    bounds(torch.empty(7, 4, device="meta"), torch.empty(7, dtype=torch.bool, device="meta"), 0)
    with all_at_once():
        bounds(torch.empty(7, 4), torch.ones(7, dtype=torch.bool), 0)
    assert rows == [7, 7]


def test_no_rows_are_no_picks() -> None:
    none, real = torch.randn(0, 5, 3), torch.ones(0, 5, dtype=torch.bool)
    assert greedy_max_sum(none, real, torch.zeros(0, dtype=torch.int64), 2).shape == (0, 2)
    assert greedy_dpp(none, torch.ones(0, 5), real, 2).shape == (0, 2)
    assert greedy_coverage(torch.randn(0, 4, 5), real, 2)[0].shape == (0, 2)
    assert group_sums(none, torch.zeros(0, 5, dtype=torch.int64), 2)[0].shape == (0, 2, 3)
