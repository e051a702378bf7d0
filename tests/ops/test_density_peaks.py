import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.density_peaks import cluster_means, density_peaks
from vtr.ops.distances import cosine, euclidean

pytestmark = pytest.mark.usefixtures("both_ways")


def slow(x, clusters, k, noise=None):
    """One row of tokens in Python numbers."""
    n = len(x)
    d = [[math.dist(a, b) / math.sqrt(x.shape[1]) for b in x.tolist()] for a in x.tolist()]
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / k) + (0 if noise is None else float(noise[i])) for i, row in enumerate(d)]
    largest = max(max(row) for row in d)
    apart = [min((d[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)), default=largest) for i in range(n)]
    center = sorted(range(n), key=lambda i: (-apart[i] * density[i], i))[:clusters]
    cluster = [min(range(clusters), key=lambda c: (d[i][center[c]], c)) for i in range(n)]
    for number, c in enumerate(center):
        cluster[c] = number
    return center, cluster


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("noisy", [False, True])
def test_clusters_are_those_of_the_definition(n, noisy):
    random = torch.Generator().manual_seed(n)
    for clusters in range(1, n + 1):
        x = torch.randn(3, n, 4, generator=random)
        noise = torch.rand(3, n, generator=random) * 1e-6 if noisy else None
        wide = torch.cat([x, torch.full((3, 2, 4), 5.0)], 1)  # two columns that are not real
        padded = None if noise is None else torch.nn.functional.pad(noise, (0, 2))
        real = torch.arange(n + 2).expand(3, -1) < n
        found = density_peaks(wide, real, torch.full((3,), clusters), clusters, noise=padded)
        for b in range(3):
            center, cluster = slow(x[b], clusters, clusters, None if noise is None else noise[b])
            assert found.center[b].tolist() == center and found.real[b].all()
            assert found.cluster[b].tolist() == [*cluster, -1, -1]


def test_rows_of_different_size_do_not_mix():
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, 20, 4, generator=random)
    real = torch.arange(20).expand(2, -1) < torch.tensor([[20], [7]])
    together = density_peaks(x, real, torch.tensor([5, 2]), 5)
    alone = density_peaks(x[1:, :7], real[1:, :7], torch.tensor([2]), 2)
    assert together.real.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert torch.equal(together.center[1, :2], alone.center[0]) and torch.equal(together.cluster[1, :7], alone.cluster[0])
    assert (together.cluster[1, 7:] == -1).all()


def test_identical_tokens_and_ties():
    x = torch.ones(1, 6, 3)
    found = density_peaks(x, torch.ones(1, 6, dtype=torch.bool), torch.tensor([3]), 3)
    assert found.center.tolist() == [[0, 1, 2]] and found.cluster.tolist() == [[0, 1, 2, 0, 0, 0]]


def test_means_of_clusters():
    x, cluster = torch.randn(2, 9, 3), torch.tensor([[0, 1, 1, 0, 2, 2, 2, -1, -1], [0] * 9])
    got = cluster_means(x, cluster, 4)
    for b in range(2):
        for c in range(4):
            mine = x[b][cluster[b] == c].double()
            torch.testing.assert_close(got[b, c], mine.mean(0) if len(mine) else torch.zeros(3).double())
    torch.testing.assert_close(cluster_means(x, cluster, 1, 1e-6)[1, 0], x[1].double().sum(0) / (9 + 1e-6))


def test_distances_are_exact_where_it_matters():
    x = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0)) * 8
    x[:, 5] = x[:, 2]
    far = euclidean(x)
    torch.testing.assert_close(far, torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist"))
    assert torch.equal(far, far.mT) and not far.diagonal(dim1=1, dim2=2).any() and not far[:, 2, 5].any()
    norm = x.double().norm(dim=-1) + 1e-6
    expected = 1 - x.double() @ x.double().mT / (norm[:, None] * norm[:, :, None])
    torch.testing.assert_close(cosine(x), expected, atol=1e-7, rtol=0)
    assert torch.equal(cosine(x), cosine(x).mT)


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 9))
def test_everyone_is_with_the_nearest_center_even_among_ties(seed, n, clusters, neighbours):
    random, clusters = torch.Generator().manual_seed(seed), min(clusters, n)
    x = torch.randint(0, 3, (1, n, 2), generator=random).float()  # few places: duplicates and equal distances
    real, wanted = torch.ones(1, n, dtype=torch.bool), torch.tensor([clusters])
    found = density_peaks(x, real, wanted, clusters, torch.tensor([min(neighbours, n)]))
    center = found.center[0].tolist()
    assert len(set(center)) == clusters and found.cluster[0, center].tolist() == list(range(clusters))
    distance = euclidean(x)[0]
    for i in set(range(n)) - set(center):
        to = [float(distance[i, c]) for c in center]
        assert int(found.cluster[0, i]) == to.index(min(to))
    padded = density_peaks(torch.cat([x, x[:, :1]], 1), torch.arange(n + 1)[None] < n, wanted, clusters, torch.tensor([min(neighbours, n)]))
    assert torch.equal(padded.center, found.center) and torch.equal(padded.cluster[:, :n], found.cluster)
