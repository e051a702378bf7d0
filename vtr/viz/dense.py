"""Pictures of dense predictions: the classes of every pixel, and which tokens a clustering put together."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vtr.types.errors import WrongValue

PALETTE = np.array(
    [(0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (240, 240, 240)],
    dtype=np.uint8,
)
"""Colours of classes, background first; more classes start again behind it."""


def draw_classes(classes: np.ndarray) -> Image.Image:
    """Classes `(h, w)`, 0 the background, as flat colours."""
    numbers = classes.astype(np.int64)
    return Image.fromarray(PALETTE[np.where(numbers > 0, (numbers - 1) % (len(PALETTE) - 1) + 1, 0)])


def draw_clusters(picture: np.ndarray, labels: np.ndarray, grid: tuple[int, int], cell_px: int = 16) -> Image.Image:
    """Draws every token in the mean colour of its cluster, with lines between clusters.

    Args:
        picture: `(h, w, 3)` uint8.
        labels: cluster of each token `(rows * cols,)` in raster order.
        grid: `(rows, cols)` of tokens.
        cell_px: side of a token in the result.

    Raises:
        ValueError: another number of labels than the grid has tokens.
    """
    rows, cols = grid
    if labels.shape != (rows * cols,):
        raise WrongValue(f"draw_clusters: labels must be ({rows * cols},) for a grid of {rows} x {cols}, got {labels.shape}")
    small = np.asarray(Image.fromarray(picture).resize((cols, rows), Image.Resampling.BOX), dtype=np.float64).reshape(-1, 3)
    _, cluster, count = np.unique(labels, return_inverse=True, return_counts=True)
    mean = np.stack([np.bincount(cluster, small[:, channel]) / count for channel in range(3)], axis=1)
    cells = cluster.reshape(rows, cols).repeat(cell_px, 0).repeat(cell_px, 1)
    shown = mean[cells].round().astype(np.uint8)
    shown[1:][cells[1:] != cells[:-1]] = 255
    shown[:, 1:][cells[:, 1:] != cells[:, :-1]] = 255
    return Image.fromarray(shown)
