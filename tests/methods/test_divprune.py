"""DivPrune against a brute-force reference of our own (its source is non-commercial, so no vectors are kept here)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.views import grid_cells, one_row, view_of
from vtr.methods.divprune import DivPrune, divprune, divprune_picks
from vtr.types import Budget, Geometry, VtrError

GEOMETRY = Geometry("test", 4, 2, 1, True, (6, 6), 5, 36)


def brute_force(tokens: Tensor, keep: int) -> list[int]:
    """The card, step by step, in plain Python on `tokens (N, D)`."""
    unit = F.normalize(tokens, dim=-1)
    distance = (1 - unit @ unit.T).tolist()
    n = len(tokens)
    second = [sorted(row)[1] if n > 1 else row[0] for row in distance]
    picked = [max(range(n), key=lambda i: (second[i], -i))]
    while len(picked) < keep:
        rest = [i for i in range(n) if i not in picked]
        picked.append(max(rest, key=lambda i: (min(distance[i][p] for p in picked), -i)))
    return picked


@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_picks_equal_brute_force_for_every_budget(seed: int, n: int, duplicates: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, n, 3, generator=generator)
    if duplicates:
        tokens = tokens[:, torch.randint(n, (n,), generator=generator)]
    real = torch.ones(1, n, dtype=torch.bool)
    picks, _ = divprune_picks(tokens, real, n)
    assert sorted(picks[0].tolist()) == list(range(n))
    if not duplicates:
        assert picks[0].tolist() == brute_force(tokens[0], n)
    for keep in range(1, n + 1):
        mask = divprune(tokens, real, torch.tensor([keep]), keep)
        assert mask.sum() == keep and mask[0, picks[0, :keep]].all()


def test_rows_of_different_length_and_budget_do_not_touch_each_other() -> None:
    view = view_of([grid_cells(6, 6), grid_cells(3, 3), grid_cells(1, 1)], [9, 4, 1], (6, 6), pad=1)
    (step,) = DivPrune().steps(GEOMETRY)
    assert step.select is not None
    keep = step.select(view).keep
    assert keep.sum(1).tolist() == [9, 4, 1] and not (keep & ~view.real).any()
    for row in range(3):
        assert torch.equal(step.select(one_row(view, row)).keep[0], keep[row, : view.counts[row]])


def test_duplicates_are_kept_once_by_default_and_again_under_compat() -> None:
    tokens = torch.eye(4)[torch.tensor([0, 1, 2, 3] * 4)][None]
    real, keep = torch.ones(1, 16).bool(), torch.tensor([8])
    assert divprune(tokens, real, keep, 8).sum() == 8
    assert divprune(tokens, real, keep, 8, repeat=True).sum() < 8
    assert divprune(torch.zeros_like(tokens), real, keep, 8).sum() == 8, "zero vectors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    tokens = torch.randn(1, 20, 6).to(dtype)
    real, keep = torch.ones(1, 20).bool(), torch.tensor([5])
    assert torch.equal(divprune(tokens, real, keep, 5), divprune(tokens.float(), real, keep, 5))


def test_defaults_are_the_papers() -> None:
    assert DivPrune().budget == Budget(keep_ratio=0.098) and Budget(keep_ratio=0.098).resolve(576) == 56
    assert DivPrune.published_positions == "renumber"


def test_compat_is_refused_where_it_would_have_to_rank_newlines() -> None:
    assert DivPrune(compat="authors").steps(GEOMETRY)
    with pytest.raises(VtrError, match="divprune: compat='authors' ranks newline tokens"):
        DivPrune(compat="authors").steps(Geometry("test", 4, 2, 1, True, (6, 6), 5, 180, anyres=True))
    with pytest.raises(ValueError, match="compat must be None or 'authors', got 'paper'"):
        DivPrune(compat="paper")  # type: ignore[arg-type]
