"""Attention windows of a token grid: cut, padded at the right and the bottom, and put together again."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def to_windows(tokens: Tensor, window: int) -> Tensor:
    """Cuts a grid into windows of `window x window`, zeros at the right and the bottom where they do not fit.

    Args:
        tokens: `(B, H, W, D)`.
        window: side K.

    Returns:
        `(B * ceil(H / K) * ceil(W / K), K*K, D)`: windows in raster order within each image, tokens in raster order within each window.
    """
    height, width = tokens.shape[1:3]
    padded = F.pad(tokens, (0, 0, 0, -width % window, 0, -height % window))
    parts = padded.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, rows, K, cols, K, D)
    return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(windows: Tensor, count: tuple[int, int], crop: tuple[int, int] | None = None) -> Tensor:
    """Puts windows back as a grid.

    Args:
        windows: `(B * rows * cols, k*k, D)` as `to_windows` orders them; k need not be the side they were cut with.
        count: `(rows, cols)` of windows per image.
        crop: `(H, W)` to cut the padding off, None keeps it.

    Returns:
        `(B, rows*k, cols*k, D)`, or `(B, H, W, D)`.
    """
    side = round(windows.shape[1] ** 0.5)
    parts = windows.unflatten(0, (-1, *count)).unflatten(3, (side, side)).transpose(2, 3)  # (B, rows, k, cols, k, D)
    grid = parts.flatten(3, 4).flatten(1, 2)
    return grid if crop is None else grid[:, : crop[0], : crop[1]]
