"""Distances are a metric, zero for duplicates, and those of the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vtr.ops.distances import cosine, euclidean

seeds = st.integers(0, 10**6)


def tokens_of(seed: int, n: int, scale: float = 1.0) -> Tensor:
    """Half of the rows are repeated somewhere."""
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(1, n, 4, generator=random)[:, torch.randint(0, max(n // 2, 1), (n,), generator=random)]


@given(seeds, st.integers(1, 9), st.sampled_from([1e-3, 1.0, 1e4]))
def test_euclidean_is_a_metric_with_zero_for_duplicates_only(seed: int, n: int, scale: float) -> None:
    tokens = tokens_of(seed, n, scale)
    found = euclidean(tokens)[0]
    torch.testing.assert_close(found, torch.cdist(tokens.double(), tokens.double(), compute_mode="donot_use_mm_for_euclid_dist")[0])
    assert torch.equal(found, found.T)
    assert torch.equal(found == 0, (tokens[0][:, None] == tokens[0]).all(-1))
    detour = (found[:, :, None] + found[None]).amin(1)  # the shortest way over any third token
    assert bool((found <= detour + 1e-9 * scale).all())


@given(seeds, st.integers(1, 9))
def test_cosine_is_symmetric_between_0_and_2_and_blind_to_length(seed: int, n: int) -> None:
    tokens = tokens_of(seed, n)
    found = cosine(tokens, eps=0.0)
    assert torch.equal(found, found.mT) and not found.diagonal(dim1=1, dim2=2).any()
    assert float(found.min()) > -1e-12 and float(found.max()) < 2 + 1e-12
    factor = 2.0 ** torch.arange(n)[:, None]
    torch.testing.assert_close(cosine(tokens * factor, eps=0.0), found)


@pytest.mark.parametrize("between", [euclidean, cosine])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_duplicates_are_as_far_from_everything(between, scale):
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randn(2, 40, 24, generator=random) * scale
        tokens[:, 25:] = tokens[:, 3:18]
        found = between(tokens)
        assert torch.equal(found[:, 25:], found[:, 3:18])
