"""Properties of choosing by score and of sharing a budget out, against brute force."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.topk import quota, topk_mask

pytestmark = pytest.mark.usefixtures("both_ways")
few_values = st.sampled_from([0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan])


def expected(score: list[float], real: list[bool], keep: int) -> set[int]:
    value = [-math.inf if math.isnan(s) else s for s in score]
    return set(sorted((i for i, r in enumerate(real) if r), key=lambda i: (-value[i], i))[:keep])


@given(st.lists(st.tuples(few_values, st.booleans()), min_size=1, max_size=8), st.integers(0, 9))
def test_topk_keeps_the_best_real_ones_and_the_lowest_index_at_ties(items: list[tuple[float, bool]], keep: int) -> None:
    score, real = zip(*items, strict=True)
    mask = topk_mask(torch.tensor([score]), torch.tensor([real]), torch.tensor([keep]))
    assert set(mask[0].nonzero()[:, 0].tolist()) == expected(list(score), list(real), keep)


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 4))
def test_topk_of_a_row_does_not_depend_on_its_neighbours_or_padding(seed: int, n: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (rows, n), generator=generator).float()
    real = torch.rand(rows, n, generator=generator) < 0.7
    keep = torch.randint(0, n + 1, (rows,), generator=generator)
    together = topk_mask(torch.cat([score, torch.full((rows, 3), 9.0)], 1), torch.cat([real, torch.zeros(rows, 3).bool()], 1), keep)
    for row in range(rows):
        alone = topk_mask(score[row : row + 1], real[row : row + 1], keep[row : row + 1])
        assert torch.equal(together[row, :n], alone[0])
    assert not together[:, n:].any()


@given(st.integers(0, 10**6))
def test_topk_is_equivariant_under_permutation_of_distinct_scores(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randperm(12, generator=generator)[None].float()
    real = torch.rand(1, 12, generator=generator) < 0.8
    order = torch.randperm(12, generator=generator)
    mask = topk_mask(score, real, torch.tensor([5]))
    assert torch.equal(topk_mask(score[:, order], real[:, order], torch.tensor([5])), mask[:, order])


def test_topk_compares_half_precision_in_float32_and_keeps_float64() -> None:
    real, one = torch.ones(1, 2).bool(), torch.tensor([1])
    close_scores = torch.tensor([[1.0, 1.0 + 2**-40]], dtype=torch.float64)
    assert topk_mask(close_scores, real, one).tolist() == [[False, True]]
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.bool):
        assert topk_mask(torch.tensor([[2.0, 0.0]]).to(dtype), real, one).tolist() == [[True, False]]


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.booleans())
def test_a_cpu_keeps_the_same_without_sorting(seed: int, n: int, rows: int, full: bool, same: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.tensor([0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan])[torch.randint(0, 7, (rows, n), generator=generator)]
    real = torch.rand(rows, n, generator=generator) < (2 if full else 0.7)
    keep = torch.randint(0, n + 1, (rows,), generator=generator).minimum(real.sum(1))
    keep = keep.amin().expand(rows) if same else keep
    counts, keeps = real.sum(1).tolist(), keep.tolist()
    masks = [
        topk_mask(score, real, keep),
        topk_mask(score, real, keep, (counts, keeps)),
        topk_mask(score, real, keep, most=max(keeps)),
        topk_mask(score, real, keep, most=n + 3),
    ]
    for row, own in enumerate(real.tolist()):
        wanted = expected(score[row].tolist(), own, keeps[row])
        assert all(set(mask[row].nonzero()[:, 0].tolist()) == wanted for mask in masks)


def largest_remainder(weight: list[int], total: int) -> list[int]:
    """Without caps, in exact arithmetic."""
    floor = [w * total // sum(weight) for w in weight]
    by_rest = sorted(range(len(weight)), key=lambda i: (-(weight[i] * total % sum(weight)), i))
    for i in by_rest[: total - sum(floor)]:
        floor[i] += 1
    return floor


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 100))
def test_quota_is_largest_remainder_while_no_part_is_full(weight: list[int], total: int) -> None:
    capacity = torch.full((1, len(weight)), 1000)
    assert quota(torch.tensor([weight]).double(), capacity, torch.tensor([total])).tolist() == [largest_remainder(weight, total)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 60))
def test_quota_hands_out_everything_within_the_capacities(parts: list[tuple[int, int]], total: int) -> None:
    weight, capacity = zip(*parts, strict=True)
    share = quota(torch.tensor([weight]).double(), torch.tensor([capacity]), torch.tensor([total]))[0].tolist()
    assert sum(share) == min(total, sum(capacity))
    assert all(0 <= s <= c for s, c in zip(share, capacity, strict=True))


def by_rounds(weight: list[int], capacity: list[int], total: int) -> list[int]:
    """The definition in exact arithmetic: fill what is over its capacity, share the rest out again, until nothing is over."""
    share, left = [0] * len(weight), min(total, sum(capacity))
    while True:
        room = [c - s for c, s in zip(capacity, share, strict=True)]
        active = [w if r else 0 for w, r in zip(weight, room, strict=True)]
        active = active if any(active) else [int(r > 0) for r in room]
        wanted = [Fraction(a * left, max(sum(active), 1)) for a in active]
        over = [i for i, (w, r) in enumerate(zip(wanted, room, strict=True)) if r and w >= r]
        if not over or not left:
            break
        for i in over:
            share[i], left = capacity[i], left - room[i]
    floor = [int(w) for w in wanted]
    by_rest = sorted((i for i in range(len(weight)) if room[i]), key=lambda i: (floor[i] - wanted[i], i))
    for i in by_rest[: left - sum(floor)]:
        floor[i] += 1
    return [s + f for s, f in zip(share, floor, strict=True)]


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(0, 12)), min_size=1, max_size=8), st.integers(0, 70))
def test_quota_is_what_rounds_of_filling_give(parts: list[tuple[int, int]], total: int) -> None:
    weight, capacity = (list(column) for column in zip(*parts, strict=True))
    scaled = torch.tensor([weight, weight]).double() / torch.tensor([[1.0], [16.0]])
    share = quota(scaled, torch.tensor([capacity, capacity]), torch.tensor([total, total]))
    assert share.tolist() == [by_rounds(weight, capacity, total)] * 2


def test_quota_gives_the_rest_of_a_full_part_to_the_others() -> None:
    share = quota(torch.tensor([[10.0, 1.0, 1.0]]), torch.tensor([[2, 9, 9]]), torch.tensor([10]))
    assert share.tolist() == [[2, 4, 4]]


def test_quota_without_weights_shares_equally_and_ties_go_to_the_lowest_index() -> None:
    assert quota(torch.zeros(1, 3), torch.tensor([[9, 9, 9]]), torch.tensor([4])).tolist() == [[2, 1, 1]]
    assert quota(torch.zeros(1, 3), torch.tensor([[0, 9, 9]]), torch.tensor([5])).tolist() == [[0, 3, 2]]
