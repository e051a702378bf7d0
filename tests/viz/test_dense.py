"""Pictures of classes and clusters."""

import numpy as np
import pytest

from vtr.data.segmentation import CLASSES
from vtr.viz.dense import PALETTE, draw_classes, draw_clusters


def test_every_class_has_its_colour():
    assert len({tuple(color) for color in PALETTE.tolist()}) == len(CLASSES) == len(PALETTE)
    classes = np.array([[0, 1], [7, 8]], dtype=np.uint8)
    assert np.array_equal(np.asarray(draw_classes(classes)), PALETTE[[[0, 1], [7, 1]]])


def test_a_cluster_has_the_mean_colour_of_its_tokens():
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 4:6] = 100
    picture[:, 6:] = 200
    shown = np.asarray(draw_clusters(picture, np.array([5, 5, 9, 9] * 2), (2, 4), cell_px=4))
    assert shown.shape == (8, 16, 3)
    assert (shown[:, :8] == 0).all() and (shown[:, 8] == 255).all() and (shown[:, 9:] == 150).all()


def test_labels_must_fit_the_grid():
    with pytest.raises(ValueError, match=r"labels must be \(6,\) for a grid of 2 x 3, got \(5,\)"):
        draw_clusters(np.zeros((4, 6, 3), np.uint8), np.zeros(5, int), (2, 3))
