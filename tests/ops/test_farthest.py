"""Farthest-point picking against a brute-force reference."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vtr.ops.farthest import cosine_distance_rows, farthest_first


def greedy(distance: Tensor, real: list[int], first: int, count: int) -> list[int]:
    """The definition, in plain Python."""
    picked = [first]
    while len(picked) < count:
        rest = [i for i in real if i not in picked]
        picked.append(max(rest, key=lambda i: (min(distance[i, p].item() for p in picked), -i)))
    return picked


@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_picks_are_the_greedy_ones(seed: int, n: int, few_values: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, n, 3, generator=generator)
    if few_values:
        tokens = tokens.sign()  # many identical tokens: ties
    real = torch.rand(1, n, generator=generator) < 0.8
    real[0, int(torch.randint(n, (1,), generator=generator))] = True
    row, nearest_other = cosine_distance_rows(tokens, real)
    assert isinstance(row, Tensor)
    distance = row[0]
    alive = real[0].nonzero()[:, 0].tolist()
    for i in alive:
        others = [distance[i, j].item() for j in alive if j != i]
        wanted = sorted([distance[i, i].item(), *others])[1] if others else torch.inf
        assert len(alive) == n or others or nearest_other[0, i] == wanted
        assert abs(nearest_other[0, i].item() - wanted) < 1e-6 or wanted == torch.inf
    first = nearest_other.argmax(1)
    assert real[0, first[0]]
    picks = farthest_first(first, row, real, len(alive))[0].tolist()
    assert picks == greedy(distance, alive, int(first), len(alive))
    assert sorted(picks) == alive, "each real token once"


@given(st.integers(0, 10**6))
def test_picks_follow_a_permutation_of_the_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, order = torch.randn(1, 12, 4, generator=generator).double(), torch.randperm(12, generator=generator)
    real, first = torch.ones(1, 12).bool(), torch.tensor([3])
    row, _ = cosine_distance_rows(tokens, real)
    moved_row, _ = cosine_distance_rows(tokens[:, order], real)
    picks = farthest_first(first, row, real, 6)[0]
    moved = farthest_first(order.argsort()[first], moved_row, real, 6)[0]
    assert torch.equal(order[moved], picks)


def test_rows_on_demand_equal_the_dense_matrix() -> None:
    dice = torch.Generator().manual_seed(0)
    tokens, real = torch.randn(2, 40, 5, generator=dice), torch.rand(2, 40, generator=dice) < 0.9
    dense_row, dense_nearest = cosine_distance_rows(tokens, real)
    row, nearest = cosine_distance_rows(tokens, real, dense_limit=10)
    torch.testing.assert_close(nearest, dense_nearest, atol=1e-6, rtol=0)
    assert isinstance(dense_row, Tensor) and not isinstance(row, Tensor)
    for pick in (torch.tensor([0, 39]), torch.tensor([7, 11])):
        torch.testing.assert_close(row(pick), dense_row[torch.arange(2), pick], atol=1e-6, rtol=0)
    first = nearest.argmax(1)
    assert torch.equal(farthest_first(first, row, real, 9), farthest_first(first, dense_row, real, 9))


def test_identical_and_zero_vectors_give_distinct_picks() -> None:
    for tokens in (torch.ones(1, 6, 4), torch.zeros(1, 6, 4), torch.full((1, 6, 4), torch.nan)):
        real = torch.ones(1, 6).bool()
        row, nearest = cosine_distance_rows(tokens, real)
        assert farthest_first(nearest.argmax(1), row, real, 6)[0].sort().values.tolist() == list(range(6))


def test_one_token() -> None:
    row, nearest = cosine_distance_rows(torch.randn(1, 1, 4), torch.ones(1, 1).bool())
    assert farthest_first(nearest.argmax(1), row, torch.ones(1, 1).bool(), 1).tolist() == [[0]]


def test_repeat_picks_duplicates_again() -> None:
    tokens = torch.eye(4)[torch.tensor([0, 1, 2, 3] * 4)][None]
    real = torch.ones(1, 16).bool()
    row, nearest = cosine_distance_rows(tokens, real)
    picks = farthest_first(nearest.argmax(1), row, real, 8, repeat=True)[0].tolist()
    assert len(set(picks[:4])) == 4 and len(set(picks)) < 8
