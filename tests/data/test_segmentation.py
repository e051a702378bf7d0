"""Which class a pixel shows, and how well a guess fits."""

import numpy as np
import pytest

from vtr.data.scenes import SHAPES, Item, Scene, Sign, draw, mask
from vtr.data.segmentation import CLASSES, confusion, iou, score, segment, test_scenes
from vtr.data.shapes import test_samples

SIGN = CLASSES.index("sign")


def test_pixels_have_the_class_of_what_is_drawn_there():
    ring, square = Item("ring", "red", "large", 60, 60, 30), Item("square", "blue", "small", 140, 40, 15)
    sign = Sign("OK", "white", 80, 120)
    scene = Scene(192, (1, 2), (ring, square), (sign,))
    classes = segment(scene)
    assert (classes == 1 + SHAPES.index("ring")).sum() == mask("ring", 30).sum()
    assert (classes == 1 + SHAPES.index("square")).sum() == mask("square", 15).sum()
    assert classes[60, 60] == 0 and classes[60, 85] == 1 + SHAPES.index("ring")
    assert (classes[120 : 120 + sign.height, 80 : 80 + sign.width] == SIGN).all() and (classes == SIGN).sum() == sign.height * sign.width
    bare = draw(Scene(192, scene.seed))
    assert ((draw(scene) != bare).any(-1) <= (classes > 0)).all()


def test_a_coarser_pixel_belongs_to_what_inks_half_of_it():
    scene = test_scenes(5)[0]
    fine, coarse = segment(scene), segment(scene, 2)
    inked = (fine > 0).reshape(192, 2, 192, 2).sum((1, 3))
    assert coarse.shape == (192, 192) and ((coarse > 0) == (inked >= 2)).all()
    assert set(np.unique(coarse)) == set(np.unique(fine))


def test_iou_by_hand():
    counts = confusion(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 2]))
    found = iou(counts)
    assert counts[0, 1] == 1 and counts[1, 2] == 1 and counts.sum() == 5
    assert found[:3].tolist() == [1 / 2, 2 / 4, 0] and np.isnan(found[3:]).all()


def test_the_truth_scores_full_marks_and_background_none():
    scenes = test_scenes(5)
    pictures, targets = [draw(scene) for scene in scenes], [segment(scene, 2) for scene in scenes]
    truth = {picture.tobytes(): target for picture, target in zip(pictures, targets, strict=True)}
    perfect = score(lambda shown: np.stack([truth[picture.tobytes()] for picture in shown]), pictures, targets, batch=2)
    assert perfect.shape[0] == 5 and np.nanmin(iou(perfect.sum(0))) == 1
    nothing = score(lambda shown: np.zeros((len(shown), 192, 192), np.uint8), pictures, targets)
    assert np.nanmax(iou(nothing.sum(0))[1:]) == 0 and nothing.sum() == 5 * 192 * 192


def test_test_scenes_are_those_of_the_test_split():
    assert list(test_scenes(10)) == [sample.scene for sample in test_samples(limit=2)]
    for count in (0, 7, 2505):
        with pytest.raises(ValueError, match=f"test_scenes: count must be a multiple of 5 from 5 to 2500, got {count}"):
            test_scenes(count)
