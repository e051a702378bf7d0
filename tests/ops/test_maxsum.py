import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vtr.ops.maxsum as maxsum
from vtr.ops.blocks import all_at_once
from vtr.ops.maxsum import greedy_max_sum

pytestmark = pytest.mark.usefixtures("both_ways")


def slow(tokens, real, first, most):
    """One row at a time, in float64, in the words of the paper."""
    orders = []
    for x, there, pivot in zip(tokens.double(), real, first.tolist()):
        unit = F.normalize(x, dim=-1, eps=1e-12)
        order = [pivot]
        while len(order) < most:
            total = (unit @ unit[order].T).sum(1)
            total[~there], total[order] = torch.inf, torch.inf
            order.append(int(total.argmin()))
        orders.append(order)
    return torch.tensor(orders)


@pytest.mark.parametrize(("n", "width"), [(40, 24), (61, 3)])  # with a Gram matrix, and without
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_picks_are_those_of_the_definition(n, width, dtype):
    random = torch.Generator().manual_seed(n)
    tokens = torch.randn(3, n, width, generator=random, dtype=dtype)
    real = torch.rand(3, n, generator=random) < 0.9
    first = real.to(torch.uint8).argmax(1)
    assert torch.equal(greedy_max_sum(tokens, real, first, 17), slow(tokens, real, first, 17))


def test_both_ways_agree(monkeypatch):
    tokens, real = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(1)), torch.ones(2, 50, dtype=torch.bool)
    first = torch.tensor([3, 40])
    calls = []
    with_gram = greedy_max_sum(tokens, real, first, 50)
    products = maxsum.row_products
    monkeypatch.setattr(maxsum, "row_products", lambda *a: calls.append(1) or products(*a))
    with all_at_once():
        parts = [greedy_max_sum(tokens[:, :, :3], real, first, 50), slow(tokens[:, :, :3], real, first, 50)]
    assert calls, "50 tokens of width 3 are beyond the memory rule"
    assert torch.equal(*parts) and torch.equal(with_gram, slow(tokens, real, first, 50))
    assert all(sorted(row) == list(range(50)) for row in with_gram.tolist())


@pytest.mark.parametrize("width", [2, 32])
def test_ties_go_to_the_lowest_index(width):
    tokens = torch.ones(1, 9, width)
    real = torch.ones(1, 9, dtype=torch.bool)
    assert greedy_max_sum(tokens, real, torch.tensor([4]), 9).tolist() == [[4, 0, 1, 2, 3, 5, 6, 7, 8]]


def test_zero_and_nan_tokens_are_similar_to_nothing():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [torch.nan, torch.nan], [1.0, 0.1]]])
    order = greedy_max_sum(tokens, torch.ones(1, 4, dtype=torch.bool), torch.tensor([0]), 4)
    assert order.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("width", [3, 64])
def test_a_batch_changes_nothing(width):
    tokens, real = torch.randn(5, 70, width, generator=torch.Generator().manual_seed(3)), torch.ones(5, 70, dtype=torch.bool)
    first = torch.arange(5)
    together = greedy_max_sum(tokens, real, first, 35)
    alone = [greedy_max_sum(tokens[i : i + 1], real[i : i + 1], first[i : i + 1], 35) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_one_token_and_one_pick():
    assert greedy_max_sum(torch.randn(2, 1, 4), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), 1).tolist() == [
        [0],
        [0],
    ]


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1, 24]))
def test_every_pick_is_least_similar_to_those_before(seed, n, width):
    random = torch.Generator().manual_seed(seed)
    tokens, real = torch.randn(1, n, width, generator=random), torch.rand(1, n, generator=random) < 0.8
    first = torch.randint(0, n, (1,), generator=random)
    real[0, first] = True
    order = greedy_max_sum(tokens, real, first, int(real.sum()))[0].tolist()
    assert order[0] == int(first) and sorted(order) == real[0].nonzero()[:, 0].tolist()
    unit = F.normalize(tokens[0].double(), dim=-1)
    for count in range(1, len(order)):
        total = (unit @ unit[order[:count]].T).sum(1)
        assert float(total[order[count]]) <= float(total[order[count:]].min()) + 1e-5


def test_a_guess_beside_a_pick_changes_nothing(monkeypatch):
    """Beyond the cache a CPU multiplies with two tokens at a time."""
    tokens, real = torch.randn(2, 90, 40, generator=torch.Generator().manual_seed(2)), torch.ones(2, 90, dtype=torch.bool)
    first = torch.tensor([3, 40])
    monkeypatch.setattr("vtr.ops.unit.CACHE", 0)
    monkeypatch.setattr(maxsum, "gram_pays", lambda *_: False)
    assert torch.equal(greedy_max_sum(tokens, real, first, 60), slow(tokens, real, first, 60))
