"""Clustering and reconstruction against their definition in float64, on every shape that tiles differently."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtr.ops.clusters import (
    cell_means,
    cell_pivots,
    cluster,
    constant,
    hard_labels,
    home_cells,
    tiles_of,
)
from vtr.ops.reconstruct import are_few, mean_of_nearest, nearest, reconstruct, reconstruction
from vtr.ops.rotary import cell_rotation
from vtr.ops.windows import from_windows, to_windows

SHAPES = [
    ((24, 24), (14, 14), 5),
    ((16, 24), (8, 12), 7),
    ((40, 40), (28, 28), 5),
    ((37, 37), (20, 21), 3),  # prime sides: tiles overlap
    ((22, 76), (5, 16), 5),
    ((7, 5), (7, 5), 5),  # identity grid
    ((1, 9), (1, 3), 3),
    ((3, 2), (1, 1), 5),
    ((13, 13), (13, 4), 1),
]


def tokens_of(grid: tuple[int, int], batch: int = 2, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(seed))


@cache
def allowed(grid: tuple[int, int], clusters: tuple[int, int], window: int) -> Tensor:
    """`(N, M)` bool, written out: a token of row y lies in the cell floor(y h / H)."""
    rows, cols = clusters
    y, x = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).T[..., None]
    i, j = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).T[:, None]
    return ((y * rows // grid[0] - i).abs() <= window // 2) & ((x * cols // grid[1] - j).abs() <= window // 2)


def squared_distances(tokens: Tensor, centres: Tensor) -> Tensor:
    """`(..., N, M)`, of differences and not of products."""
    return torch.cdist(tokens, centres, compute_mode="donot_use_mm_for_euclid_dist").square()


def by_definition(tokens: Tensor, grid, clusters, window: int, tau: float, iterations: int) -> Tensor:
    tokens, may = tokens.double(), allowed(grid, clusters, window)
    centres = torch.nn.functional.adaptive_avg_pool2d(tokens.mT.unflatten(2, grid), clusters).flatten(2).mT
    for _ in range(iterations):
        distance = squared_distances(tokens, centres)
        member = (-tau * distance).masked_fill(~may, -torch.inf).softmax(-1)
        centres = member.mT @ tokens / member.sum(1).clamp_min(1e-16)[..., None]
    return centres


@pytest.mark.parametrize(("grid", "clusters", "window"), SHAPES)
@pytest.mark.parametrize("iterations", [0, 3])
def test_centres_are_those_of_the_definition(grid, clusters, window, iterations):
    tokens = tokens_of(grid)
    wanted = by_definition(tokens, grid, clusters, window, 0.1, iterations)
    torch.testing.assert_close(
        cluster(tokens, grid, clusters, tau=0.1, iterations=iterations, window=window).double(), wanted, atol=1e-5, rtol=0
    )
    wide = cluster(tokens.double(), grid, clusters, tau=0.1, iterations=iterations, window=window)
    torch.testing.assert_close(wide, wanted, atol=1e-12, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 4), st.sampled_from([1, 3, 5]))
def test_any_grid_is_clustered_as_defined(sides, window):
    grid = (max(sides[0], sides[2]), max(sides[1], sides[3]))
    clusters = (min(sides[0], sides[2]), min(sides[1], sides[3]))
    tokens = tokens_of(grid, 1, 3).double()
    made = cluster(tokens, grid, clusters, tau=0.5, iterations=2, window=window)
    torch.testing.assert_close(made, by_definition(tokens, grid, clusters, window, 0.5, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("grid", "clusters", "window"), SHAPES)
def test_every_token_is_in_exactly_one_tile_with_all_its_candidates(grid, clusters, window):
    tiles = tiles_of(grid, clusters, window, torch.device("cpu"))
    real = torch.ones_like(tiles.tokens, dtype=torch.bool) if tiles.real is None else tiles.real[..., 0] > 0
    assert tiles.tokens[real].sort().values.tolist() == list(range(grid[0] * grid[1]))
    may = allowed(grid, clusters, window)
    for token, centre, bias, own in zip(tiles.tokens, tiles.centres, tiles.bias, real, strict=True):
        assert torch.equal(bias[own] == 0, may[token[own]][:, centre])
        assert int((bias[own] == 0).sum()) == int(may[token[own]].sum())


def test_large_grids_are_compared_in_parts():
    tiles = tiles_of((40, 40), (28, 28), 5, torch.device("cpu"))
    assert tiles.bias.numel() < 1600 * 784 / 8


def test_rows_do_not_see_each_other_and_may_have_their_own_tau():
    tokens = tokens_of((9, 8), 3)
    tau = torch.tensor([0.05, 0.5, 2.0])
    together = cluster(tokens, (9, 8), (4, 5), tau=tau)
    weights = reconstruction(tokens, together, tau=tau, neighbours=4)
    for row in range(3):
        alone = cluster(tokens[row : row + 1], (9, 8), (4, 5), tau=float(tau[row]))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reconstruction(tokens[row : row + 1], alone, tau=float(tau[row]), neighbours=4)[0], weights[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_computes_in_float32(dtype):
    tokens = (tokens_of((12, 12)) * 30).to(dtype)  # squared norms are beyond float16
    centres = cluster(tokens, (12, 12), (6, 6), tau=0.001)
    assert centres.dtype == torch.float32
    torch.testing.assert_close(centres, cluster(tokens.float(), (12, 12), (6, 6), tau=0.001))
    weights = reconstruction(tokens, centres, tau=0.001)
    full = reconstruct(weights, centres.to(dtype))
    assert weights.dtype == torch.float32 and full.dtype == dtype and full.isfinite().all()


def test_as_many_centres_as_tokens_and_a_sharp_tau_change_nothing():
    tokens = tokens_of((6, 7), width=32)
    centres = cluster(tokens, (6, 7), (6, 7), tau=1e5)
    torch.testing.assert_close(centres, tokens)
    torch.testing.assert_close(reconstruct(reconstruction(tokens, centres, tau=1e5), centres), tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": (5, 3)}, r"clusters \(5, 3\) must be from \(1, 1\) to the token grid \(4, 4\)"),
        ({"clusters": (0, 3)}, r"clusters \(0, 3\) must be from"),
        ({"window": 4}, "window must be odd and at least 1, got 4"),
        ({"window": -1}, "window must be odd and at least 1, got -1"),
        ({"iterations": -1}, "iterations must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_clustered_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        cluster(tokens_of((4, 4)), (4, 4), **{"clusters": (2, 2), "tau": 1.0, **settings})


def test_hard_labels_are_the_nearest_of_all_and_the_first_of_equals():
    tokens = torch.tensor([[[0.0], [2.0], [9.0]]])
    assert hard_labels(tokens, torch.tensor([[[1.0], [1.0], [8.0]]])).tolist() == [[0, 0, 2]]


def test_pivots_are_the_real_token_nearest_to_the_middle_of_a_cell():
    grid, clusters = (7, 9), (2, 4)
    real = torch.rand(3, 63, generator=torch.Generator().manual_seed(1)) < 0.5
    real[0], real[2] = True, False
    pivot, some = cell_pivots(grid, clusters, real)
    home = home_cells(grid, clusters)
    for row in range(3):
        for cell in range(8):
            members = [t for t in range(63) if home[t] == cell and real[row, t]]
            assert bool(some[row, cell]) == bool(members)
            assert home[pivot[row, cell]] == cell
            if members:
                middle = ((cell // 4 + 0.5) * 7 / 2, (cell % 4 + 0.5) * 9 / 4)  # of the cell's span, in tokens
                away = {t: (t // 9 + 0.5 - middle[0]) ** 2 + (t % 9 + 0.5 - middle[1]) ** 2 for t in members}
                assert away[int(pivot[row, cell])] == pytest.approx(min(away.values()))


@pytest.mark.parametrize("normalize", ["sum", "l2"])
@pytest.mark.parametrize("neighbours", [1, 3, 99, -1])
def test_weights_are_those_of_the_definition(normalize, neighbours):
    tokens, centres = tokens_of((5, 4)).double(), tokens_of((3, 2), seed=1).double()
    wanted = (-0.3 * (tokens[:, :, None] - centres[:, None]).square().sum(-1)).exp()
    if 0 < neighbours < 6:
        wanted = wanted * (wanted >= wanted.sort(-1, descending=True).values[..., neighbours - 1 : neighbours])
    norm = wanted.sum(-1, keepdim=True) if normalize == "sum" else wanted.norm(dim=-1, keepdim=True)
    made = reconstruction(tokens, centres, tau=0.3, neighbours=neighbours, normalize=normalize)
    torch.testing.assert_close(made, wanted / norm, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_nearest_alone_restore_as_all_the_weights_do(dtype):
    tokens, centres, refined = tokens_of((5, 4)).to(dtype), tokens_of((3, 3), seed=1).to(dtype), tokens_of((3, 3), seed=2).to(dtype)
    tau = torch.tensor([0.3, 0.7])
    weights = reconstruction(tokens, centres, tau=tau, neighbours=4)
    index, some = nearest(tokens, centres, tau=tau, neighbours=4)
    torch.testing.assert_close(torch.zeros_like(weights).scatter(-1, index, some), weights)
    full = mean_of_nearest(index, some, refined.requires_grad_())
    assert full.dtype == dtype
    torch.testing.assert_close(full, reconstruct(weights, refined))
    wanted = torch.autograd.grad(reconstruct(weights, refined).float().square().sum(), refined)
    rounding = 0.02 if dtype == torch.bfloat16 else 1e-5  # its gradients are summed in it
    torch.testing.assert_close(torch.autograd.grad(full.float().square().sum(), refined), wanted, atol=rounding, rtol=rounding)


def test_ties_for_the_last_place_are_cut_where_only_the_nearest_count():
    centres = torch.tensor([[[1.0], [-1.0], [5.0]]])
    index, weights = nearest(torch.zeros(1, 1, 1), centres, tau=1.0, neighbours=1)
    assert int(index) in (0, 1) and weights.tolist() == [[[1.0]]]
    assert not are_few(1, 3) and not are_few(-1, 99) and not are_few(20, 121) and are_few(20, 676)  # not in the windows of SAM


def test_ties_with_the_last_neighbour_count_and_far_tokens_keep_a_weight():
    centres = torch.tensor([[[1.0], [-1.0], [5.0]]])
    assert reconstruction(torch.zeros(1, 1, 1), centres, tau=1.0, neighbours=1)[0, 0].tolist() == [0.5, 0.5, 0.0]
    far = reconstruction(torch.full((1, 1, 1), 1e3), centres, tau=1.0, neighbours=2)  # exp(-tau d) is 0 in float32
    torch.testing.assert_close(far.sum(), torch.tensor(1.0))


def test_bad_reconstructions_are_refused():
    with pytest.raises(ValueError, match="neighbours must be at least 1, or negative for all centres, got 0"):
        reconstruction(tokens_of((2, 2)), tokens_of((1, 1)), tau=1.0, neighbours=0)
    with pytest.raises(ValueError, match="normalize must be 'sum' or 'l2', got 'max'"):
        reconstruction(tokens_of((2, 2)), tokens_of((1, 1)), tau=1.0, normalize="max")


@pytest.mark.parametrize(("height", "width", "window"), [(20, 20, 14), (14, 14, 14), (5, 9, 4), (3, 3, 5)])
def test_windows_come_back_together(height, width, window):
    grid = torch.randn(2, height, width, 3)
    cut = to_windows(grid, window)
    count = (-(-height // window), -(-width // window))
    assert cut.shape == (2 * count[0] * count[1], window * window, 3)
    assert torch.equal(from_windows(cut, count, (height, width)), grid)
    whole = from_windows(cut, count)
    assert torch.equal(whole[:, :height, :width], grid) and not whole[:, height:].any() and not whole[:, :, width:].any()


@pytest.mark.parametrize(("grid", "clusters"), [((8, 6), (4, 3)), ((7, 9), (3, 4)), ((5, 5), (5, 5))])
def test_rotary_tables_of_cells_have_their_mean_coordinates(grid, clusters):
    frequency = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)

    def table(rows: Tensor, cols: Tensor) -> Tensor:
        place = torch.cartesian_prod(rows, cols)
        return torch.cat([place[:, :1] * frequency, place[:, 1:] * frequency, (place.sum(1, keepdim=True)) * frequency / 2], 1)

    full = table(*(torch.arange(n, dtype=torch.float64) for n in grid))
    means = [
        cell_means(torch.arange(n, dtype=torch.float64)[None, :, None], (1, n), (1, c))[0, :, 0]
        for n, c in zip(grid, clusters, strict=True)
    ]
    wanted = table(*means)
    cos, sin = cell_rotation(full.cos(), full.sin(), grid, clusters)
    torch.testing.assert_close(cos, wanted.cos())
    torch.testing.assert_close(sin, wanted.sin())


def test_the_mark_of_a_constant_is_the_one_that_torch_sets() -> None:
    """Known without the function of torch that sets it, which takes seconds to import."""
    mark = vars(torch.compiler.assume_constant_result(lambda: 0))
    assert mark and mark.items() <= vars(constant(lambda: 0)).items()
