"""One picture of a report: the image or video itself goes in, and which of its patches were retained comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vtr.types.errors import WrongType, WrongValue
from vtr.viz.patches import draw_patches
from vtr.viz.pixels import views_from_inputs, views_from_videos

_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def draw(picture: Any, report: Any, number: int = 0, processor: Any = None, view_px: int | None = None) -> Image.Image:
    """Draws which patches of an image or a video were retained, removed and merged.

    Args:
        picture: the image as PIL opens it; of a video its frames as a list of such images, as the processor got them; or the pixels of views or
            frames `(V, H, W, 3)` uint8, see `vtr.viz.views_from_pixels`.
        report: from `Reduction.report()`, or what its `to_dict()` returned.
        number: of the image or video among the report's `images`.
        processor: the model's, which says what the tower saw: crops, padding, views of AnyRes. Without it the image is laid under the grid of
            patches as a whole, which is right for processors that only resize.
        view_px: width of one view in the result; None for 480, and 240 of a frame.

    Returns:
        A PIL image: retained patches as they were, removed ones dimmed, merged ones tinted like their pivot, of a video in whichever frame that is.

    Raises:
        TypeError: neither an image, nor frames, nor pixels.
        ValueError: no such image in the report, an image of another bit depth than 8, another number of frames than was reported, or an image
            that was shown in several views without `processor`.
    """
    entry = _entry(report, number)
    video = entry.get("kind") == "video"
    if isinstance(picture, np.ndarray):
        views = picture
    else:
        views = _frames(picture, entry, processor) if video else _views(picture, entry, processor)
    if views.ndim != 4 or views.shape[-1] != 3 or views.dtype != np.uint8:
        raise WrongValue(f"draw: pixels must be (V, H, W, 3) uint8, got {views.shape} {views.dtype}; see vtr.viz.views_from_pixels")
    return draw_patches(views, entry, view_px, resized=bool(getattr(report, "resized", False)))


def _entry(report: Any, number: int) -> Mapping[str, Any]:
    images = report["images"] if isinstance(report, Mapping) else getattr(report, "images", None)
    if not isinstance(images, (list, tuple)):
        raise WrongType(f"draw: report must be what Reduction.report() returns, with its images, got {type(report).__name__}")
    if not 0 <= number < len(images):
        raise WrongValue(f"draw: number must be 0 to {len(images) - 1}, the images of this report, got {number}")
    return images[number] if isinstance(images[number], Mapping) else images[number].to_dict()


def _frames(pictures: Any, entry: Mapping[str, Any], processor: Any) -> np.ndarray:
    """Returns the pixels of every view of a video; where the tower sees several frames as one, of the first of them."""
    if not isinstance(pictures, (list, tuple)) or not pictures or not all(isinstance(one, Image.Image) for one in pictures):
        got = f"{len(pictures)} things" if isinstance(pictures, (list, tuple)) else type(pictures).__name__
        raise WrongType(f"draw: of a video picture must be a list of PIL images, its frames, or an array of pixels, got {got}")
    frames, count = [_eight_bits(one) for one in pictures], entry["views"]
    if count not in (len(frames), -(-len(frames) // 2)):
        raise WrongValue(
            f"draw: the report is of a video of {count} frames, or of pairs, got {len(frames)}; give the frames that the model was shown"
        )
    if processor is not None:
        given = {"text": processor.video_token} if getattr(processor, "video_token", None) else {}
        inputs = (processor if given else processor.video_processor)(videos=[frames], **given, do_sample_frames=False, return_tensors="pt")
        return views_from_videos(inputs, processor.video_processor, [count], [frames])[0]
    return np.stack([np.asarray(one) for one in frames[:: -(-len(frames) // count)]])


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode not in _EIGHT_BITS:
        raise WrongValue(f"draw: picture must have 8 bits per channel, got mode {picture.mode!r}; convert it as your viewer does")
    return picture.convert("RGB")


def _views(picture: Any, entry: Mapping[str, Any], processor: Any) -> np.ndarray:
    if not isinstance(picture, Image.Image):
        raise WrongType(f"draw: picture must be a PIL image or an array of pixels, got {type(picture).__name__}")
    picture = _eight_bits(picture)
    if processor is not None:
        settings, mark = getattr(processor, "image_processor", processor), getattr(processor, "image_token", None)
        given = (
            {} if settings is processor or mark is None else {"text": mark}
        )  # a processor may tell its image processor more than it knows
        inputs = (processor if given else settings)(images=picture, **given, return_tensors="pt")
        return views_from_inputs(inputs, settings, [entry["views"]], [picture])[0]
    if entry["views"] > 1:
        raise WrongValue(
            f"draw: this image was shown in {entry['views']} views, got a picture; give processor=, or the pixels of the views"
        )
    return np.asarray(picture)[None]
