import pytest
import torch
import torch.nn.functional as F

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
