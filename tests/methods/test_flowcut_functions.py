"""The pure functions of FlowCut, by hand and against float64."""

import math

import pytest
import torch

from vtr.methods.flowcut import flow_score, flowcut, last_row, prune_amount, semantic_row, value_strength, view_targets

HEADS, WIDTH = 3, 4


def test_targets_of_views():
    available = torch.tensor([[36, 36, 36], [36, 2, 2], [36, 0, 0], [36, 36, 0]])
    assert view_targets(torch.tensor([20, 20, 20, 1]), available, False).tolist() == [[10, 10, 10], [16, 2, 2], [20, 0, 0], [1, 1, 0]]
    assert view_targets(torch.tensor([27, 20, 20, 1]), available, True).sum(1).tolist() == [27, 20, 20, 1]
    assert view_targets(torch.tensor([9]), torch.tensor([[4]]), False).tolist() == [[4]]


def test_prune_amount_by_hand_and_with_zero_attention():
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.9], [0.2, 0.2, 0.2, 0.2, 0.0]])
    real = torch.tensor([[True, True, True, True, False], [True, True, True, True, True]])
    part, target = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[2], [1]])
    got = prune_amount(attention, part, real, target, 4)[:, 0]
    p = torch.tensor([1 / 6, 2 / 6, 3 / 6], dtype=torch.float64)
    first = 2 / 2 * (1 - ((-(p * p.log()).sum()) / math.log(4)) ** 2)
    second = 4 / 2 * (1 - (math.log(4) / math.log(5)) ** 2)
    torch.testing.assert_close(got.double(), torch.tensor([float(first), second], dtype=torch.float64), atol=1e-6, rtol=0)
    assert prune_amount(attention, part, real, torch.tensor([[4], [9]]), 4).tolist() == [[0], [0]]
    assert prune_amount(attention, part, real, target, 0).isinf().all()


def test_flowcut_rounds_half_to_even_and_stops_at_the_target():
    score, part, real = torch.arange(8.0)[None], torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.bool)
    for amount, left in ((2.5, 6), (3.5, 4), (7.0, 3), (torch.inf, 3), (0.2, 8)):
        kept = flowcut(score, torch.tensor([[amount]]), part, real, torch.tensor([[3]]))
        assert kept[0].nonzero().flatten().tolist() == list(range(8 - left, 8))


def test_views_of_an_image_share_the_largest_amount():
    part, real = torch.tensor([[0] * 6 + [1] * 6]), torch.ones(1, 12, dtype=torch.bool)
    kept = flowcut(torch.rand(1, 12), torch.tensor([[1.2, 3.0]]), part, real, torch.tensor([[2, 4]]))
    assert [int(kept[0, part[0] == v].sum()) for v in (0, 1)] == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_strength_against_float64(dtype):
    random = torch.Generator().manual_seed(0)
    values = torch.randn(2, 9, HEADS, WIDTH, generator=random).to(dtype)
    cls_values = torch.randn(2, 2, HEADS, WIDTH, generator=random).to(dtype)
    part = torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    real = torch.rand(2, 9, generator=random) < 0.8
    got, strength = semantic_row(values, cls_values, part, real), value_strength(values)
    assert got.dtype == strength.dtype == torch.float32
    for g in range(2):
        torch.testing.assert_close(strength[g].double(), values[g].double().mean(1).abs().sum(1), atol=1e-5, rtol=0)
        for v in (0, 1):
            own = real[g] & (part[g] == v)
            every = torch.cat([cls_values[g, v][None], values[g, own]]).double()
            expected = torch.einsum("hd,nhd->hn", cls_values[g, v].double(), every).softmax(-1)[:, 1:].mean(0)
            torch.testing.assert_close(got[g, own].double(), expected, atol=1e-5, rtol=0)
    assert (got[~real] == 0).all()


def test_last_row_with_grouped_queries():
    random = torch.Generator().manual_seed(0)
    last, keys = torch.randn(2, 6, 4, generator=random), torch.randn(2, 7, 3, 4, generator=random)
    real = torch.tensor([[True] * 7, [False, True] * 3 + [True]])
    every = keys.repeat_interleave(2, 2).double()
    logits = torch.einsum("ghd,gnhd->ghn", last.double(), every) / 2
    expected = logits.masked_fill(~real[:, None], -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(last_row(last, keys, real).double(), expected, atol=1e-6, rtol=0)


def test_permuted_patches_score_alike():
    random = torch.Generator().manual_seed(0)
    attention, semantic, strength = (torch.rand(1, 12, generator=random) for _ in range(3))
    part, real = torch.randint(0, 2, (1, 12), generator=random), torch.ones(1, 12, dtype=torch.bool)
    order = torch.randperm(12, generator=random)
    moved = flow_score(*(x[:, order] for x in (attention, semantic, strength, part, real)), 2)
    torch.testing.assert_close(moved, flow_score(attention, semantic, strength, part, real, 2)[:, order])
