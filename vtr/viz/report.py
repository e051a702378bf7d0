"""One picture of a report: the image itself goes in, and which of its patches were retained comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vtr.viz.patches import VIEW_PX, draw_patches
from vtr.viz.pixels import views_from_inputs

_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def draw(picture: Any, report: Any, number: int = 0, processor: Any = None, view_px: int = VIEW_PX) -> Image.Image:
    """Draws which patches of an image were retained, removed and merged.

    Args:
        picture: the image as PIL opens it, or the pixels of its views `(V, H, W, 3)` uint8, see `vtr.viz.views_from_pixels`.
        report: from `Reduction.report()`, or what its `to_dict()` returned.
        number: of the image among the report's `images`.
        processor: the model's, which says what the tower saw: crops, padding, views of AnyRes. Without it the image is laid under the grid of
            patches as a whole, which is right for processors that only resize.
        view_px: width of one view in the result.

    Returns:
        A PIL image: retained patches as they were, removed ones dimmed, merged ones tinted like their pivot.

    Raises:
        TypeError: neither an image nor pixels.
        ValueError: no such image in the report, an image of another bit depth than 8, or one that was shown in several views without `processor`.
    """
    entry = _entry(report, number)
    views = picture if isinstance(picture, np.ndarray) else _views(picture, entry, processor)
    if views.ndim != 4 or views.shape[-1] != 3 or views.dtype != np.uint8:
        raise ValueError(f"draw: pixels must be (V, H, W, 3) uint8, got {views.shape} {views.dtype}; see vtr.viz.views_from_pixels")
    return draw_patches(views, entry, view_px, resized=bool(getattr(report, "resized", False)))


def _entry(report: Any, number: int) -> Mapping[str, Any]:
    images = report["images"] if isinstance(report, Mapping) else getattr(report, "images", None)
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"draw: report must be what Reduction.report() returns, with its images, got {type(report).__name__}")
    if not 0 <= number < len(images):
        raise ValueError(f"draw: number must be 0 to {len(images) - 1}, the images of this report, got {number}")
    return images[number] if isinstance(images[number], Mapping) else images[number].to_dict()


def _views(picture: Any, entry: Mapping[str, Any], processor: Any) -> np.ndarray:
    if not isinstance(picture, Image.Image):
        raise TypeError(f"draw: picture must be a PIL image or an array of pixels, got {type(picture).__name__}")
    if picture.mode not in _EIGHT_BITS:
        raise ValueError(f"draw: picture must have 8 bits per channel, got mode {picture.mode!r}; convert it as your viewer does")
    picture = picture.convert("RGB")
    if processor is not None:
        settings, mark = getattr(processor, "image_processor", processor), getattr(processor, "image_token", None)
        given = (
            {} if settings is processor or mark is None else {"text": mark}
        )  # a processor may tell its image processor more than it knows
        inputs = (processor if given else settings)(images=picture, **given, return_tensors="pt")
        return views_from_inputs(inputs, settings, [entry["views"]], [picture])[0]
    if entry["views"] > 1:
        raise ValueError(
            f"draw: this image was shown in {entry['views']} views, got a picture; give processor=, or the pixels of the views"
        )
    return np.asarray(picture)[None]
