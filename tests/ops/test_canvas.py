import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.canvas import block_sums, canvas_cells, crops_of, even_blocks, of_crops, on_device, spread_over, valid_region

CPU = torch.device("cpu")


def even_sums(values, crop_grids, crops):
    """Sums of thumbnail maps `(G, R, C)` over the blocks of crops."""
    side = max(values.shape[1:])
    blocks = of_crops(even_blocks, [(grid, (values.shape[1], values.shape[2]), crops, side) for grid in crop_grids], CPU)
    return block_sums(F.pad(values, (0, side - values.shape[2], 0, side - values.shape[1])), blocks)


def test_valid_region_of_wide_tall_and_fitting_images():
    assert valid_region((750, 1000), (2, 2), (24, 24)) == [6, 42, 0, 48]
    assert valid_region((1100, 400), (3, 1), (24, 24)) == [3, 69, 0, 24]
    assert valid_region((1000, 100), (2, 2), (24, 24)) == [0, 48, 22, 26]
    assert valid_region((500, 500), (2, 2), (24, 24)) == [0, 48, 0, 48]


def test_rounding_before_cutting_can_win_a_row():
    found = [
        (h, w)
        for h in range(1, 60)
        for w in range(1, 60)
        if valid_region((h, w), (2, 3), (6, 6)) != valid_region((h, w), (2, 3), (6, 6), 7)
    ]
    assert all(abs(h * 18 / w - round(h * 18 / w)) < 1e-6 or abs(w * 12 / h - round(w * 12 / h)) < 1e-6 for h, w in found)


@pytest.mark.parametrize(("grid", "crops"), [((24, 24), (2, 2)), ((7, 5), (3, 2)), ((3, 3), (1, 5)), ((6, 6), (6, 1))])
def test_block_sums_are_sums_over_blocks(grid, crops):
    values = torch.randn(1, *grid, generator=torch.Generator().manual_seed(0))
    down, across = max(grid[0] // crops[0], 1), max(grid[1] // crops[1], 1)
    expected = []
    for i in range(crops[0]):
        for j in range(crops[1]):
            bottom = grid[0] if i == crops[0] - 1 else (i + 1) * down
            right = grid[1] if j == crops[1] - 1 else (j + 1) * across
            expected.append(values[0, i * down : bottom, j * across : right].double().sum())
    torch.testing.assert_close(even_sums(values, [crops], crops[0] * crops[1])[0], torch.stack(expected))


def test_groups_with_different_crop_grids():
    values = torch.randn(3, 6, 6)
    grids = [(2, 2), (0, 0), (1, 3)]
    together = even_sums(values, grids, 4)
    torch.testing.assert_close(together[0], even_sums(values[:1], grids[:1], 4)[0])
    torch.testing.assert_close(together[2, :3], even_sums(values[2:], grids[2:], 3)[0])
    assert together[2, 3] == 0 and not together[1].any()


@pytest.mark.parametrize(("crop_grid", "patch_grid"), [((2, 2), (6, 6)), ((1, 3), (6, 5)), ((3, 1), (4, 7)), ((1, 1), (5, 5))])
@pytest.mark.parametrize("free", [0, 1, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_thumbnail_spread_over_the_crops_is_an_interpolation_cut_into_them(crop_grid, patch_grid, free, axis):
    """The canvas has `free` lines without a token on both sides; beside it in the batch are a group without crops and one of another grid."""
    (down, across), (rows, cols), side = crop_grid, patch_grid, 7
    thumbnail = torch.randn(3, side, side, generator=torch.Generator().manual_seed(2))
    valid, resized = torch.zeros(down * rows, across * cols, dtype=torch.bool), torch.zeros(down * rows, across * cols)
    size = [length - 2 * free * (axis == dim) for dim, length in enumerate(valid.shape)]
    valid.narrow(axis, free, size[axis])[:] = True
    resized[valid] = F.interpolate(thumbnail[None, :1, :rows, :cols], size, mode="bilinear", align_corners=False).flatten()

    def cut(canvas):
        crops = canvas.unflatten(0, (down, rows)).unflatten(2, (across, cols)).transpose(1, 2).flatten(0, 1)
        return F.pad(crops, (0, side - cols, 0, side - rows, 0, 4 - len(crops)))

    there = torch.stack([cut(valid), torch.zeros(4, side, side, dtype=torch.bool), torch.ones(4, side, side, dtype=torch.bool)])
    got = spread_over(thumbnail, there, crops_of([crop_grid, (0, 0), (2, 2)], [patch_grid, (6, 6), (7, 7)], side, CPU))
    torch.testing.assert_close(got[0][there[0]], cut(resized)[there[0]], atol=1e-5, rtol=0)
    assert got.isfinite().all()
    number = down * across
    alone = spread_over(thumbnail[:1], there[:1, :number], crops_of([crop_grid], [patch_grid], side, CPU))
    assert torch.equal(alone[0], got[0, :number])


def test_canvas_cells_put_crops_side_by_side():
    cells = torch.tensor([[[0, 1, 1], [1, 0, 0], [2, 0, 3], [3, 5, 2]]])
    row, col = canvas_cells(cells, torch.tensor([[2, 2]]), (6, 6))
    assert row[0, 1:].tolist() == [0, 0, 11] and col[0, 1:].tolist() == [0, 9, 2]


def test_on_device_keeps_values():
    assert on_device([(1, 2), (3, 4)], torch.device("cpu")).tolist() == [[1, 2], [3, 4]]


@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]))
def test_the_valid_region_is_centred_and_touches_two_sides(height, width, crops):
    rows, cols = crops[0] * 6, crops[1] * 6
    top, bottom, left, right = valid_region((height, width), crops, (6, 6))
    assert 0 <= top <= bottom <= rows and 0 <= left <= right <= cols
    assert top == rows - bottom and left == cols - right
    assert (top, bottom) == (0, rows) or (left, right) == (0, cols)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_blocks_cover_every_cell_once(seed, rows, cols, down, across):
    values = torch.randint(0, 9, (1, rows * down, cols * across), generator=torch.Generator().manual_seed(seed)).double()
    sums = even_sums(values, [(down, across)], down * across + 2)
    assert float(sums.sum()) == float(values.sum()) and not sums[0, down * across :].any()
