"""Windows of a grid come back together as the grid, whatever sides they have."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.windows import from_windows, to_windows

sides = st.integers(1, 9)


@given(sides, sides, st.integers(1, 5), st.integers(1, 2))
def test_a_grid_survives_being_cut(height: int, width: int, window: int, batch: int) -> None:
    tokens = torch.arange(1, batch * height * width * 2 + 1).float().view(batch, height, width, 2)
    rows, cols = -(-height // window), -(-width // window)
    windows = to_windows(tokens, window)
    assert windows.shape == (batch * rows * cols, window * window, 2)
    assert torch.equal(from_windows(windows, (rows, cols), (height, width)), tokens)
    padded = from_windows(windows, (rows, cols))
    assert not padded[:, height:].any() and not padded[:, :, width:].any(), "padded with zeros"
    for number, part in enumerate(windows):
        image, place = divmod(number, rows * cols)
        top, left = (side * window for side in divmod(place, cols))
        assert torch.equal(part.view(window, window, 2), padded[image, top : top + window, left : left + window])


@given(sides, sides, st.integers(2, 4), st.integers(1, 4))
def test_smaller_windows_stand_where_the_larger_ones_stood(height: int, width: int, window: int, smaller: int) -> None:
    count = (-(-height // window), -(-width // window))
    numbers = torch.arange(count[0] * count[1]).float()
    grid = from_windows(numbers[:, None, None].expand(-1, smaller * smaller, 1), count)
    assert torch.equal(grid[0, ::smaller, ::smaller, 0], numbers.view(count))
    assert torch.equal(grid, grid[:, ::smaller, ::smaller].repeat_interleave(smaller, 1).repeat_interleave(smaller, 2))
