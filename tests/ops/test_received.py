import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.received import attention_received


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_it_is_the_column_mean_of_the_whole_map(chunk):
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 7, 4, 5, generator=random).unbind(0)
    real = torch.tensor([[True] * 7, [True, False, True, True, False, False, True], [False] * 6 + [True]])
    got = attention_received(query, key, real, chunk)
    for g in range(3):
        q, k = query[g, real[g]].transpose(0, 1), key[g, real[g]].transpose(0, 1)  # (H, n, d)
        expected = (q @ k.mT / 5**0.5).softmax(-1).mean((0, 1))
        torch.testing.assert_close(got[g, real[g]], expected)
        assert not got[g, ~real[g]].any()


def test_nobody_asks_in_an_empty_row_and_float64_stays():
    query = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    got = attention_received(query, query, torch.zeros(1, 4, dtype=torch.bool))
    assert got.dtype == torch.float64 and not got.any()


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 9))
def test_a_whole_attention_is_received_in_chunks_of_any_size(seed, n, chunk):
    random = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, n, 2, 3, generator=random).double().unbind(0)
    real = torch.rand(2, n, generator=random) < 0.8
    got = attention_received(query, key, real, chunk)
    torch.testing.assert_close(got.sum(1), real.any(1).double())
    torch.testing.assert_close(got, attention_received(query, key, real))
    assert not got[~real].any()
