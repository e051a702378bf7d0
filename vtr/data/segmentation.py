"""Semantic segmentation of the `shapes` scenes: which class each pixel shows, and the test pictures."""

from collections.abc import Callable, Sequence

import numpy as np

from vtr.types.errors import WrongValue

from .scenes import SHAPES, Scene, mask
from .shapes import FAMILIES, PER_FAMILY, test_samples

CLASSES = ("background", *SHAPES, "sign")
MOST_TEST_SCENES = len(FAMILIES) * PER_FAMILY


def segment(scene: Scene, zoom: int = 1) -> np.ndarray:
    """Returns the class of every pixel; objects do not overlap.

    Args:
        scene: what was drawn.
        zoom: scene pixels per pixel of the result along each axis, 1 or 2. A pixel belongs to an object that inks half of it.

    Returns:
        `(size / zoom, size / zoom)` uint8, indices of `CLASSES`. The hole of a ring is background.
    """
    classes = np.zeros((scene.size, scene.size), dtype=np.uint8)
    for item in scene.items:
        left, top, right, bottom = item.box
        classes[top:bottom, left:right][mask(item.shape, item.radius)] = SHAPES.index(item.shape) + 1
    for sign in scene.signs:
        left, top, right, bottom = sign.box
        classes[top:bottom, left:right] = len(SHAPES) + 1
    if zoom == 1:
        return classes
    side = scene.size // zoom
    parts = classes.reshape(side, zoom, side, zoom)  # objects are 4 pixels apart, so a part holds at most one
    return np.where((parts > 0).sum((1, 3)) * 2 >= zoom * zoom, parts.max((1, 3)), 0)


def confusion(target: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Returns how often each class was taken for each: `(classes, classes)` int64, rows are the truth."""
    count = len(CLASSES)
    pairs = target.astype(np.int64).ravel() * count + guess.ravel()
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def iou(counts: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class `(classes,)` from 0 to 1 for `confusion` counts; NaN for classes that never occur."""
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return np.where(union > 0, counts.diagonal() / np.maximum(union, 1), np.nan)


def score(
    classify: Callable[[list[np.ndarray]], np.ndarray], pictures: Sequence[np.ndarray], targets: Sequence[np.ndarray], batch: int = 10
) -> np.ndarray:
    """Returns `confusion` of a model on each picture `(pictures, classes, classes)`.

    Args:
        classify: pictures `(size, size, 3)` uint8 to classes `(B, h, w)`.
        pictures: what is shown, see `vtr.data.scenes.draw`.
        targets: `(h, w)` each, see `segment`.
        batch: pictures at a time.
    """
    counts = []
    for start in range(0, len(pictures), batch):
        part = slice(start, start + batch)
        counts += [confusion(target, guess) for target, guess in zip(targets[part], classify(list(pictures[part])), strict=True)]
    return np.stack(counts)


def test_scenes(count: int = 200) -> Sequence[Scene]:
    """Returns the scenes of the test split of `shapes`, as many of each family; never drawn in training.

    Args:
        count: a multiple of 5 up to 2500.

    Raises:
        ValueError: another count.
    """
    if count % len(FAMILIES) or not 0 < count <= MOST_TEST_SCENES:
        raise WrongValue(
            f"test_scenes: count must be a multiple of {len(FAMILIES)} from {len(FAMILIES)} to {MOST_TEST_SCENES}, got {count}"
        )
    return [sample.scene for sample in test_samples(limit=count // len(FAMILIES))]


test_scenes.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test
