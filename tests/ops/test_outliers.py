import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.outliers import quantile, upper_fence


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]))
def test_quantiles_are_numpys(seed, n, q):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(3, n, generator=random).round(decimals=1)
    real = torch.rand(3, n, generator=random) < 0.6
    for got, row, there in zip(quantile(values, real, q), values, real):
        expected = np.quantile(row[there].double().numpy(), q) if there.any() else np.inf
        assert float(got) == pytest.approx(expected, abs=1e-12)


def test_fence_is_the_inter_quartile_rule():
    values = torch.tensor([[1.0, 2, 3, 4, 100], [5, 5, 5, 5, 5]])
    real = torch.ones(2, 5, dtype=torch.bool)
    assert upper_fence(values, real).tolist() == [4 + 1.5 * 2, 5]
    assert upper_fence(values, real, 3).tolist() == [4 + 3 * 2, 5]
    assert (values > upper_fence(values, real)[:, None]).sum(1).tolist() == [1, 0], "equal values are no outliers"


def test_a_row_without_entries_has_no_outliers():
    assert upper_fence(torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)).tolist() == [torch.inf]
    one = torch.tensor([[False, True, False]])
    assert upper_fence(torch.tensor([[9.0, 2.0, 9.0]]), one).tolist() == [2.0]
