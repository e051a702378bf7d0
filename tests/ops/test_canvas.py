import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.canvas import block_sums, canvas_cells, on_device, resized_at, valid_region


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
    torch.testing.assert_close(block_sums(values, torch.tensor([crops]), crops[0] * crops[1])[0], torch.stack(expected))


def test_groups_with_different_crop_grids():
    values = torch.randn(3, 6, 6)
    grids = torch.tensor([[2, 2], [0, 0], [1, 3]])
    together = block_sums(values, grids, 4)
    torch.testing.assert_close(together[0], block_sums(values[:1], grids[:1], 4)[0])
    torch.testing.assert_close(together[2, :3], block_sums(values[2:], grids[2:], 3)[0])
    assert together[2, 3] == 0


@pytest.mark.parametrize(("height", "width"), [(12, 9), (5, 31), (6, 6), (1, 2)])
def test_resized_at_is_interpolate(height, width):
    values = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2))
    row, col = torch.cartesian_prod(torch.arange(height), torch.arange(width)).T
    size = [torch.full((2,), side) for side in (height, width)]
    got = resized_at(values, row.expand(2, -1), col.expand(2, -1), *size)
    expected = F.interpolate(values[:, None], (height, width), mode="bilinear", align_corners=False).flatten(1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


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
    sums = block_sums(values, torch.tensor([[down, across]]), down * across + 2)
    assert float(sums.sum()) == float(values.sum()) and not sums[0, down * across :].any()
