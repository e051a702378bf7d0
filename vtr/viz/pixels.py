"""From the pixel values of a processor back to pictures, one per view of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image


def views_from_pixels(pixels: Any, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undoes the processor's normalisation.

    Args:
        pixels: `(V, 3, H, W)` or `(3, H, W)` floats as the tower gets them, array or tensor on any device.
        mean, std: of the image processor, per channel.

    Returns:
        `(V, H, W, 3)` uint8.
    """
    array = _array(pixels)
    array = array[None] if array.ndim == 3 else array
    shown = array * np.asarray(std, dtype=np.float32)[:, None, None] + np.asarray(mean, dtype=np.float32)[:, None, None]
    return (shown.transpose(0, 2, 3, 1) * 255).round().clip(0, 255).astype(np.uint8)


def views_from_inputs(inputs: Mapping[str, Any], settings: Any, counts: Sequence[int], images: Sequence[Image.Image]) -> list[np.ndarray]:
    """Returns the pictures that the tower sees, image by image.

    Args:
        inputs: of a processor: `pixel_values` as `(V, 3, H, W)` with the views of all images one after the other (beside `image_sizes (N, 2)` filled
            up to the largest image), `(N, V, 3, H, W)` filled up to the image with most views, or `(patches, values)` beside
            `image_grid_thw (N, 3)`. Of anything else the images themselves are returned.
        settings: the image processor.
        counts: views of every image.
        images: what was given to the processor, RGB.

    Returns:
        Per image `(V, H, W, 3)` uint8.
    """
    pixels = inputs["pixel_values"]
    if pixels.ndim not in (2, 4, 5):
        return [np.asarray(image)[None] for image in images]
    if pixels.ndim == 2:
        found = _unpacked(_array(pixels), np.asarray(inputs["image_grid_thw"].tolist()), settings.patch_size, settings.merge_size)
    elif pixels.ndim == 4:
        ends = np.cumsum(counts).tolist()
        found = [pixels[end - count : end] for end, count in zip(ends, counts, strict=True)]
        if inputs.get("image_sizes") is not None:
            found = [own[..., :height, :width] for own, (height, width) in zip(found, inputs["image_sizes"].tolist(), strict=True)]
    else:
        found = [own[:count] for own, count in zip(pixels, counts, strict=True)]
    return [views_from_pixels(own, settings.image_mean, settings.image_std) for own in found]


def views_from_videos(
    inputs: Mapping[str, Any], settings: Any, counts: Sequence[int], videos: Sequence[Sequence[Image.Image]]
) -> list[np.ndarray]:
    """Returns the frames that the tower sees, video by video; where it sees several as one, the first of them.

    Args:
        inputs: of a processor: `pixel_values_videos` as `(N, T, 3, H, W)`, or `(patches, values)` beside `video_grid_thw (N, 3)`. Of anything else
            the frames themselves are returned.
        settings: the video processor.
        counts: views of every video: its frames, or pairs of them.
        videos: what was given to the processor, RGB.

    Returns:
        Per video `(V, H, W, 3)` uint8.
    """
    pixels = inputs["pixel_values_videos"]
    if isinstance(pixels, (list, tuple)):
        found = [_array(own)[:count] for own, count in zip(pixels, counts, strict=True)]
    elif pixels.ndim == 2:
        found = _unpacked(_array(pixels), np.asarray(inputs["video_grid_thw"].tolist()), settings.patch_size, settings.merge_size)
    elif pixels.ndim == 5:
        found = [own[:count] for own, count in zip(pixels, counts, strict=True)]
    else:
        return [np.stack([np.asarray(one) for one in own[:: -(-len(own) // count)]]) for own, count in zip(videos, counts, strict=True)]
    return [views_from_pixels(own, settings.image_mean, settings.image_std) for own in found]


def _unpacked(patches: np.ndarray, grids: np.ndarray, side: int, merge: int) -> list[np.ndarray]:
    """Returns images `(T, 3, H, W)` of packed patches, which lie block by block of `merge x merge`; of doubled frames the first."""
    found, start = [], 0
    for frames, rows, cols in grids.tolist():
        own = patches[start : start + frames * rows * cols]
        start += len(own)
        size = {"t": frames, "r": rows // merge, "c": cols // merge, "i": merge, "j": merge, "rgb": 3, "k": side, "l": side}
        own = rearrange(own, "(t r c i j) (rgb double k l) -> double t rgb (r i k) (c j l)", **size)
        found.append(own[0])
    return found


def _array(pixels: Any) -> np.ndarray:
    return np.asarray(pixels.detach().float().cpu() if hasattr(pixels, "detach") else pixels, dtype=np.float32)
