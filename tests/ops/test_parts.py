import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.parts import board, members, part_sum, topk_per_part

pytestmark = pytest.mark.usefixtures("both_ways")


def case(seed=0, groups=3, n=23, parts=4):
    random = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 6, (groups, n), generator=random).float()  # many ties
    part = torch.randint(0, parts, (groups, n), generator=random)
    real = torch.rand(groups, n, generator=random) < 0.8
    keep = torch.randint(0, 9, (groups, parts), generator=random)
    return score, part, real, keep


@pytest.mark.parametrize("seed", range(6))
def test_topk_per_part_is_the_best_of_every_part_with_ties_to_the_lowest_index(seed):
    score, part, real, keep = case(seed)
    got = topk_per_part(score, part, real, keep)
    for g in range(len(score)):
        for p in range(keep.shape[1]):
            own = [i for i in range(score.shape[1]) if real[g, i] and part[g, i] == p]
            best = sorted(own, key=lambda i: (-score[g, i].item(), i))[: int(keep[g, p])]
            assert sorted(best) == [i for i in own if got[g, i]]
    assert not (got & ~real).any()


def test_topk_per_part_of_one_part_is_topk():
    score, part, real, keep = case()
    got = topk_per_part(score, torch.zeros_like(part), real, keep[:, :1])
    assert torch.equal(got.sum(1), keep[:, 0].minimum(real.sum(1)))


def test_nan_is_the_worst():
    score = torch.tensor([[torch.nan, 1.0, -torch.inf, 0.0]])
    got = topk_per_part(score, torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool), torch.tensor([[2]]))
    assert got.tolist() == [[False, True, False, True]]


def test_part_sum_ignores_what_is_not_there_even_nan():
    values = torch.tensor([[1.0, torch.nan, 2.0, 4.0]])
    member = members(torch.tensor([[0, 0, 1, 0]]), torch.tensor([[True, False, True, True]]), 3)
    assert part_sum(values, member).tolist() == [[5.0, 2.0, 0.0]]


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4))
def test_sums_of_parts_add_up_and_choices_of_parts_are_those_of_the_part_alone(seed, n, parts):
    score, part, real, keep = case(seed, 2, n, parts)
    member = members(part, real, parts)
    assert torch.equal(member.any(1), real) and int(member.sum(1).max()) <= 1
    assert torch.equal(part_sum(score, member).sum(1), torch.where(real, score, 0).sum(1))
    got = topk_per_part(score, part, real, keep)
    for p in range(parts):
        own = real & (part == p)
        alone = topk_per_part(score, torch.zeros_like(part), own, keep[:, p : p + 1])
        assert torch.equal(got & own, alone)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_views_on_a_board_are_those_of_parts(seed):
    random = torch.Generator().manual_seed(seed)
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4)).expand(2, -1, 3)  # views of 2 x 4
    real = torch.rand(2, 24, generator=random) < 0.8
    score = torch.randint(0, 6, (2, 24), generator=random).float()
    lies = board(torch.where(real[..., None], cells, 99), real, 3, 4)
    laid = lies.lay(score, -torch.inf)
    assert laid.shape == (2, 3, 4, 4) and torch.equal((laid > -torch.inf).sum((2, 3)), members(cells[..., 0], real, 3).sum(2))
    assert torch.equal(laid[:, 1, 1, 2][real[:, 14]], score[:, 14][real[:, 14]])
    keep = torch.randint(0, 9, (2, 3), generator=random).minimum((laid > -torch.inf).sum((2, 3)))
    assert torch.equal(lies.topk(laid, keep, 8), topk_per_part(score, cells[..., 0], real, keep))
