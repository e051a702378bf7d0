"""Spectra of neighbourhood graphs: what holds for every normalised Laplacian."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.spectral import BEHIND, heat_affinity, laplacian_eigen

seeds = st.integers(0, 10**6)


@given(seeds, st.integers(1, 8), st.integers(1, 8))
def test_affinities_are_symmetric_and_at_most_one(seed: int, n: int, neighbours: int) -> None:
    random = torch.Generator().manual_seed(seed)
    tokens, real = torch.randn(2, n, 3, generator=random), torch.rand(2, n, generator=random) < 0.8
    whole = heat_affinity(tokens, real)
    near = heat_affinity(tokens, real, neighbours=torch.full((2,), neighbours))
    pair = real[:, :, None] & real[:, None]
    for affinity in (whole, near):
        assert torch.equal(affinity, affinity.mT) and not affinity[~pair].any()
        assert torch.equal(affinity.diagonal(dim1=1, dim2=2), real.double())
        assert bool((affinity <= 1).all())
    assert bool(((near == whole) | (near == 0)).all())
    least = real.sum(1).clamp_max(neighbours)[:, None].expand(-1, n)
    assert bool(((near > 0).sum(2) >= least)[real].all()), "every token keeps its nearest"


@given(seeds, st.integers(1, 8))
def test_eigenvalues_begin_at_zero_and_end_below_two(seed: int, n: int) -> None:
    random = torch.Generator().manual_seed(seed)
    tokens, real = torch.randn(2, n, 3, generator=random), torch.rand(2, n, generator=random) < 0.8
    real[:, 0] = True
    values, vectors = laplacian_eigen(heat_affinity(tokens, real), real)
    for b in range(2):
        count = int(real[b].sum())
        own = values[b, :count]
        assert abs(float(own[0])) < 1e-9 and float(own[-1]) <= 2 + 1e-9
        assert float((own[1:] - own[:-1]).clamp_max(0).sum()) == 0, "ascending"
        torch.testing.assert_close(values[b, count:], torch.full((n - count,), BEHIND, dtype=torch.float64))
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(n, dtype=torch.float64).expand(2, -1, -1))
