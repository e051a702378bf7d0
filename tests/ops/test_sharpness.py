"""The softest tau at which centres stay apart, against the rule written out, and on features that collapse and features that do not."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.ops.test_clusters import SHAPES, allowed, squared_distances, tokens_of
from vtr.ops.clusters import cell_means, cluster
from vtr.ops.sharpness import APART, FARTHEST, LADDER, auto_tau


def share_left(tokens: Tensor, grid, clusters, tau: float, iterations: int = 5, sharp: float = 1e6) -> float:
    """Squared distance between adjacent centres, as a share of that at a sharp tau."""

    def apart(tau: float) -> Tensor:
        made = cluster(tokens, grid, clusters, tau=tau, iterations=iterations).unflatten(1, clusters)
        return made.diff(dim=1).square().sum() + made.diff(dim=2).square().sum()

    return float(apart(tau) / apart(sharp))


def by_rule(tokens: Tensor, grid, clusters, window: int) -> float:
    """Of one image in float64; every number of the docstring's three steps by its own means."""
    away = tokens.double() - tokens.double().mean(0)
    length = away.norm(dim=-1)
    limit = FARTHEST * length.median()
    away = torch.stack([token * min(1.0, float(limit / token.norm())) for token in away])
    start = cell_means(away[None], grid, clusters)[0]
    distance = squared_distances(away, start)
    may = allowed(grid, clusters, window)
    unit = 1 / float(distance[may].median())
    apart = []
    for step in LADDER:
        moved = cluster(away[None], grid, clusters, tau=step * unit, iterations=1, window=window)[0].unflatten(0, clusters)
        apart.append(float(moved.diff(dim=0).square().sum() + moved.diff(dim=1).square().sum()))
    if apart[-1] == 0:
        return LADDER[0] * unit
    shares = [value / apart[-1] for value in apart]
    if shares[0] >= APART:
        return LADDER[0] * unit
    for (low, high), (soft, sharp) in zip(pairwise(shares), pairwise(LADDER), strict=True):
        if high >= APART:
            part = math.log(APART / low) / math.log(high / low)
            return unit * soft * (sharp / soft) ** part
    raise AssertionError


@pytest.mark.parametrize(("grid", "clusters", "window"), SHAPES)
def test_tau_is_that_of_the_rule(grid, clusters, window):
    tokens = tokens_of(grid, 3, 12)
    tokens[1] += 10 * torch.linspace(0, 1, len(tokens[1]))[:, None]  # a gradient: few directions
    tokens[2, 0] *= 100
    wanted = [by_rule(one, grid, clusters, window) for one in tokens]
    torch.testing.assert_close(auto_tau(tokens, grid, clusters, window, torch.arange(3)), torch.tensor(wanted), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [1, 8, 400])
def test_wide_tokens_get_nearly_the_tau_of_the_rule(rank):
    generator = torch.Generator().manual_seed(rank)
    tokens = tokens_of((16, 16), 2, rank) @ torch.randn(rank, 400, generator=generator)
    tau = auto_tau(tokens, (16, 16), (10, 10), 5, torch.arange(2))
    torch.testing.assert_close(tau, torch.tensor([by_rule(one, (16, 16), (10, 10), 5) for one in tokens]), rtol=0.1, atol=0)


def test_the_ladder_is_geometric():
    assert len({round(sharp / soft, 9) for soft, sharp in pairwise(LADDER)}) == 1


def test_features_of_many_directions_need_a_sharper_tau_and_do_not_collapse():
    """Noise around a few regions: in 64 directions the softest tau, a median of 2, brings all centres together; in 2 directions it does not."""
    grid, clusters = (24, 24), (16, 16)
    generator, medians = torch.Generator().manual_seed(0), []
    for width in (2, 64):
        regions = 0.3 * torch.randn(1, width, 4, 4, generator=generator)
        tokens = torch.nn.functional.interpolate(regions, grid).flatten(2).mT + 0.5 * torch.randn(1, 576, width, generator=generator)
        start = cell_means(tokens, grid, clusters)
        median = (tokens[:, :, None] - start[:, None]).square().sum(-1)[0][allowed(grid, clusters, 5)].median()
        tau = float(auto_tau(tokens, grid, clusters, 5, torch.zeros(1, dtype=torch.long)))
        medians.append(tau * float(median))
        assert share_left(tokens, grid, clusters, tau) > 0.5
    assert medians[0] < 3 and medians[1] > 10
    assert share_left(tokens, grid, clusters, LADDER[0] / float(median)) < 0.1


def test_a_few_huge_tokens_do_not_hide_a_collapse():
    grid, clusters, image = (24, 24), (16, 16), torch.zeros(1, dtype=torch.long)
    tokens = tokens_of(grid, 1, 64)
    before = auto_tau(tokens, grid, clusters, 5, image)
    tokens[0, ::97] *= 30
    torch.testing.assert_close(auto_tau(tokens, grid, clusters, 5, image), before, rtol=0.25, atol=0)


def test_rows_of_an_image_share_a_tau_and_images_do_not_see_each_other():
    tokens = tokens_of((10, 10), 4) * torch.tensor([1.0, 3.0, 5.0, 0.0])[:, None, None]
    tau = auto_tau(tokens, (10, 10), (5, 5), 3, torch.tensor([0, 1, 1, 3]))
    assert tau[1] == tau[2] and tau[3] == 1  # an image without any difference
    alone = auto_tau(tokens[:1], (10, 10), (5, 5), 3, torch.tensor([0]))
    torch.testing.assert_close(tau[:1], alone, rtol=1e-6, atol=0)
    rows = torch.cat([auto_tau(tokens[i : i + 1], (10, 10), (5, 5), 3, torch.tensor([0])) for i in (1, 2)])
    assert rows.min() < tau[1] < rows.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_computes_in_float32(dtype):
    tokens = (tokens_of((12, 12)) * 30).to(dtype)  # squared norms are beyond float16
    tau = auto_tau(tokens, (12, 12), (6, 6), 5, torch.arange(2))
    assert tau.dtype == torch.float32
    torch.testing.assert_close(tau, auto_tau(tokens.float(), (12, 12), (6, 6), 5, torch.arange(2)))


def test_a_single_centre_has_no_neighbours():
    assert auto_tau(tokens_of((3, 2)), (3, 2), (1, 1), 5, torch.arange(2)).isfinite().all()


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"clusters \(5, 3\) must be from"):
        auto_tau(tokens_of((4, 4)), (4, 4), (5, 3), 5, torch.arange(2))
