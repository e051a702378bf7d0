import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.elbow import elbow


@pytest.mark.parametrize("n", [1, 2, 5, 8, 60])
def test_the_point_farthest_from_the_line(n):
    random = torch.Generator().manual_seed(n)
    values = torch.randint(0, 50, (3, n + 2), generator=random).double()
    real = torch.ones(3, n + 2, dtype=torch.bool)
    real[:, [0, -1]] = False
    found = elbow(values, real)
    for g in range(3):
        y = np.sort(values[g, 1:-1].numpy())[::-1]
        line = np.array([n - 1, y[-1] - y[0]], dtype=np.float64)
        unit = line / max(np.linalg.norm(line), 1e-300)
        points = np.stack([np.arange(n), y - y[0]], 1)
        distance = np.linalg.norm(points - (points @ unit)[:, None] * unit, axis=1)
        np.testing.assert_allclose(found.distance[g, :n].numpy(), distance, atol=1e-9)
        assert not found.distance[g, n:].any()
        assert distance[int(found.place[g])] == pytest.approx(distance.max(), abs=1e-9)
        assert float(found.value[g]) == y[int(found.place[g])]


def test_a_flat_curve_and_an_empty_row():
    found = elbow(torch.full((2, 4), 3.0), torch.tensor([[True] * 4, [False] * 4]))
    assert found.place.tolist() == [0, 0] and found.value.tolist() == [3.0, float("inf")]


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9), st.integers(0, 10**6))
def test_an_elbow_does_not_see_order_or_a_shift(values, seed):
    row = torch.tensor([values]).double()
    found = elbow(row, torch.ones_like(row).bool())
    assert float(found.value[0]) == sorted(values, reverse=True)[int(found.place[0])]
    assert abs(float(found.distance[0, 0])) < 1e-9 and abs(float(found.distance[0, -1])) < 1e-9, "the ends lie on the line"
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    shuffled = elbow(row[:, order] + 7, torch.ones_like(row).bool())
    assert torch.equal(shuffled.place, found.place) and torch.equal(shuffled.value, found.value + 7)
