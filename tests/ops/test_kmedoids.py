import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.distances import euclidean
from vtr.ops.kmedoids import kmedoids
from vtr.ops.spectral import heat_affinity, laplacian_eigen


def slow(distance, norm, k, iterations=100):
    """One row in Python lists."""
    n = len(norm)
    d = distance.tolist()
    start = [max(range(n), key=lambda i: (float(norm[i]), -i))]
    while len(start) < k:
        start.append(max(set(range(n)) - set(start), key=lambda i: (min(d[i][m] for m in start), -i)))

    def nearest(medoids):
        return [medoids.index(i) if i in medoids else min(range(k), key=lambda c: (d[i][medoids[c]], c)) for i in range(n)]

    medoids = list(start)
    for _ in range(iterations):
        cluster = nearest(medoids)
        members = [[i for i in range(n) if cluster[i] == c] for c in range(k)]
        medoids = [min(m, key=lambda i, m=m: (sum(d[i][j] for j in m), i)) for m in members]
    medoids = sorted(medoids)
    return start, medoids, nearest(medoids)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 25])
def test_medoids_are_those_of_the_definition(n):
    random = torch.Generator().manual_seed(n)
    for k in {1, 2, n // 2, n - 1, n} & set(range(1, n + 1)):
        x = torch.randint(-9, 9, (3, n, 3), generator=random).float()  # with duplicates and exact ties
        wide = torch.cat([torch.full((3, 1, 3), 99.0), x], 1)
        real = torch.arange(n + 1).expand(3, -1) > 0
        found = kmedoids(euclidean(wide), wide.norm(dim=-1), real, torch.full((3,), k), k)
        for b in range(3):
            start, medoids, cluster = slow(euclidean(x)[b], x[b].norm(dim=-1), k)
            assert (found.start[b] - 1).tolist() == start
            assert (found.medoid[b] - 1).tolist() == medoids and found.cluster[b, 1:].tolist() == cluster


def test_rows_of_different_budget_do_not_mix():
    x = torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(0))
    real = torch.arange(30).expand(3, -1) < torch.tensor([[30], [11], [30]])
    together = kmedoids(euclidean(x), x.norm(dim=-1), real, torch.tensor([9, 4, 0]), 9)
    assert together.real.sum(1).tolist() == [9, 4, 0]
    alone = kmedoids(euclidean(x[1:2, :11]), x[1:2, :11].norm(dim=-1), real[1:2, :11], torch.tensor([4]), 4)
    assert torch.equal(together.medoid[1, :4], alone.medoid[0]) and torch.equal(together.cluster[1, :11], alone.cluster[0])


def test_what_has_converged_stays():
    x = torch.randn(2, 60, 5, generator=torch.Generator().manual_seed(1))
    real, keep = torch.ones(2, 60, dtype=torch.bool), torch.tensor([12, 12])
    distance = euclidean(x)
    found = [kmedoids(distance, x.norm(dim=-1), real, keep, 12, iterations) for iterations in (20, 100)]
    assert torch.equal(found[0].medoid, found[1].medoid) and torch.equal(found[0].cluster, found[1].cluster)


def test_laplacian_of_the_neighbourhood_graph():
    x = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(2))
    real = torch.tensor([[True] * 8 + [False]])
    affinity = heat_affinity(x, real, 1.5, torch.tensor([3]))
    far = torch.cdist(x[0].double(), x[0].double())
    full = (-far.square() / 4.5).exp()[:8, :8]
    largest = full.topk(3).values[:, -1:]
    expected = torch.where((full >= largest) | (full >= largest).T, full, 0)
    torch.testing.assert_close(affinity[0, :8, :8], expected)
    assert not affinity[0, 8].any() and not affinity[0, :, 8].any()
    torch.testing.assert_close(heat_affinity(x, real, 1.5)[0, :8, :8], full)
    values, vectors = laplacian_eigen(affinity, real)
    scale = expected.sum(1).rsqrt().diag()
    laplacian = scale @ (expected.sum(1).diag() - expected) @ scale
    torch.testing.assert_close(values[0, :8], torch.linalg.eigvalsh(laplacian))
    assert not vectors[0, 8, :8].any()
    torch.testing.assert_close(laplacian @ vectors[0, :8, :8], vectors[0, :8, :8] * values[0, :8])


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4))
def test_medoids_own_themselves_and_iterating_never_costs_more(seed, n, clusters, iterations):
    random, clusters = torch.Generator().manual_seed(seed), min(clusters, n)
    x = torch.randint(0, 4, (1, n, 2), generator=random).float()  # duplicates and equal distances
    distance, real, wanted = euclidean(x), torch.ones(1, n, dtype=torch.bool), torch.tensor([clusters])
    costs = []
    for rounds in (0, iterations, iterations + 1):
        found = kmedoids(distance, x.norm(dim=-1), real, wanted, clusters, rounds)
        medoid = found.medoid[0].tolist()
        assert medoid == sorted(set(medoid)) and len(medoid) == clusters
        assert found.cluster[0, medoid].tolist() == list(range(clusters))
        nearest = distance[0][:, medoid].amin(1)
        assert torch.equal(distance[0].gather(1, found.medoid[0, found.cluster[0]][:, None])[:, 0], nearest)
        costs.append(float(nearest.sum()))
    assert costs[0] + 1e-9 >= costs[1] and costs[1] + 1e-9 >= costs[2]


def test_of_duplicates_the_lowest_index_is_the_medoid():
    for seed in range(20):
        x = torch.randn(1, 27, 16, generator=torch.Generator().manual_seed(seed))
        x[:, 20:] = x[:, 3:10]
        found = kmedoids(euclidean(x), x.norm(dim=-1), torch.ones(1, 27, dtype=torch.bool), torch.tensor([5]), 5)
        assert not (found.medoid >= 20).any() and not (found.start >= 20).any()
