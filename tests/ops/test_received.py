import pytest
import torch

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
