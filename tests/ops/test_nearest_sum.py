import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.nearest_sum import add_nearest, one_head_row


def one_head(query, key, heads):
    """`query (C,)`, `key (1 + N, C)` with CLS first: the heads' logits and weights, and the row of one wide head."""
    width = key.shape[1] // heads
    logits = torch.einsum("hd,nhd->hn", query.view(heads, width), key.view(-1, heads, width)) * width**-0.5
    return logits[:, 1:], logits.softmax(1)[:, 1:], (key @ query * key.shape[1] ** -0.5).softmax(0)[1:]


@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_row_of_one_wide_head_is_found_from_its_heads(strength, dtype):
    random = torch.Generator().manual_seed(0)
    rows = [one_head(strength * torch.randn(32, generator=random), torch.randn(20, 32, generator=random), 4) for _ in range(3)]
    logits, weights, expected = (torch.stack(part).to(dtype) for part in zip(*rows, strict=True))
    real = torch.ones(3, 19, dtype=torch.bool)
    torch.testing.assert_close(one_head_row(logits, weights, real), expected.double(), atol=2e-6, rtol=1e-4)


def test_entries_without_a_token_change_nothing():
    random = torch.Generator().manual_seed(1)
    logits, weights, _ = one_head(torch.randn(8, generator=random), torch.randn(6, 8, generator=random), 2)
    real = torch.tensor([[True] * 5 + [False] * 2, [False] * 7])
    padded = [F.pad(part, (0, 2), value=50.0).expand(2, -1, -1) for part in (logits, weights)]
    got = one_head_row(*padded, real)
    torch.testing.assert_close(got[:1, :5], one_head_row(logits[None], weights[None], real[:1, :5]))
    assert not got[0, 5:].any() and not got[1].any()


def slow(tokens, metric, weight, i, neighbours):
    unit = F.normalize(metric, dim=-1)
    others = sorted((j for j in range(len(tokens)) if j != i), key=lambda j: (-float(unit[i] @ unit[j]), j))[:neighbours]
    return tokens[i] + sum(weight[j] * tokens[j] for j in others)


@pytest.mark.parametrize("neighbours", [1, 3, 32])
def test_nearest_tokens_are_added(neighbours):
    random = torch.Generator().manual_seed(0)
    tokens, metric = torch.randn(2, 8, 5, generator=random), torch.randn(2, 8, 4, generator=random)
    weight, index = torch.rand(2, 8, generator=random), torch.tensor([[3, 0, 5], [2, 2, 7]])
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 6:] = False
    tokens[0, 6:] = torch.nan
    got = add_nearest(tokens, metric, weight, index, real, neighbours)
    for g in range(2):
        own = real[g]
        for k, i in enumerate(index[g].tolist()):
            torch.testing.assert_close(got[g, k], slow(tokens[g, own], metric[g, own], weight[g, own], i, neighbours))


def test_of_equal_neighbours_the_first_is_taken_and_half_precision_is_summed_in_float32():
    tokens = torch.tensor([[[1.0], [10.0], [100.0], [1000.0]]])
    same, real, weight = torch.ones(1, 4, 2), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4)
    assert add_nearest(tokens, same, weight, torch.tensor([[2]]), real, 1).tolist() == [[[101.0]]]
    got = add_nearest(tokens.to(torch.bfloat16), same, weight, torch.tensor([[2, 0]]), real, 2)
    assert got.dtype == torch.float32 and got.flatten().tolist() == [111.0, 111.0]


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 8))
def test_a_wide_head_gives_weights_and_does_not_see_a_shift_of_logits(seed, heads, n):
    random = torch.Generator().manual_seed(seed)
    logits, _, _ = one_head(
        torch.randn(2 * heads, generator=random).double(), torch.randn(n + 1, 2 * heads, generator=random).double(), heads
    )
    weights = torch.cat([torch.zeros(heads, 1).double(), logits], 1).softmax(1)[:, 1:]  # the CLS token has logit 0
    real = torch.rand(1, n, generator=random) < 0.8
    row = one_head_row(logits[None], weights[None], real)
    assert not row[~real].any() and bool((row[real] > 0).all()) and float(row.sum()) <= 1 + 1e-9
    shift = torch.randn(1, heads, 1, generator=random).double()
    torch.testing.assert_close(one_head_row(logits + shift, weights[None], real), row)


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 8))
def test_what_is_taken_in_grows_with_its_weights(seed, n, neighbours):
    random = torch.Generator().manual_seed(seed)
    tokens, metric = torch.randn(2, n, 3, generator=random).double(), torch.randn(2, n, 4, generator=random)
    weight, real = torch.rand(2, n, generator=random).double(), torch.rand(2, n, generator=random) < 0.7
    index = torch.randint(0, n, (2, 2), generator=random)
    base = tokens.gather(1, index[..., None].expand(-1, -1, 3))
    once, twice, none = (add_nearest(tokens, metric, factor * weight, index, real, neighbours) for factor in (1, 2, 0))
    assert torch.equal(none, base)
    torch.testing.assert_close(twice - base, 2 * (once - base))
