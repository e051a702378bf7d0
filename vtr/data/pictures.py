"""Picture files, of any bit depth, as 8-bit RGB, the way a viewer shows them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vtr.types import VtrError
from vtr.types.errors import WrongValue

_WHITE = (255, 255, 255)
_SIXTEEN_BITS = 65535
_PHOTOMETRIC = 262
_OVERSHOOT = 1 / 16
"""Share by which floats may overshoot 0 to 1 (or 0 to 255), as they do after resampling with a sharp filter, before they are another range."""


@contextmanager
def whole_files() -> Iterator[None]:
    """Makes cut files errors, also where something else in this process (lmms-eval does) has told Pillow to fill them up."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_image(path: str | Path, most: int | None = None) -> Image.Image:
    """Opens an image file as RGB, turned as its EXIF data says, with the brightness that a viewer gives it (see `as_shown`).

    Args:
        path: of the file.
        most: pixels; None for as many as Pillow holds safe (a small file may unpack to gigabytes).

    Raises:
        ValueError: no such file, or more pixels.
        VtrError: not an image, a damaged one, or one that cannot be shown.
    """
    path = Path(path)
    if not path.is_file():
        raise WrongValue(f"image: no file {str(path)!r}")
    limit = most or Image.MAX_IMAGE_PIXELS or float("inf")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        if image.width * image.height > limit:
            raise Image.DecompressionBombError(f"{image.width} x {image.height}")
        with whole_files():
            ImageOps.exif_transpose(image, in_place=True)
            return as_shown(image)
    except VtrError as error:
        raise VtrError(f"image: {str(path)!r}: {str(error).removeprefix('image: ')}") from None
    except Image.DecompressionBombError as error:
        raise WrongValue(f"image: {str(path)!r} has too many pixels ({error}), at most {limit:.0f}; make it smaller first") from None
    except UnidentifiedImageError:
        raise VtrError(f"image: {str(path)!r} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for truncated and broken files
        raise VtrError(f"image: {str(path)!r} is damaged ({error})") from None


def as_shown(image: Image.Image) -> Image.Image:
    """Returns the image as 8-bit RGB.

    - 16 bits: 65535 is white, also where the brightest pixel is far below, as in 12-bit data.
    - 32-bit integers: 0 to 255 or 0 to 65535 where all values lie inside, else the darkest pixel is black and the brightest white.
    - Floats: 0 to 1, 0 to 255 or 0 to 65535 likewise, else from the smallest to the largest.
    - Transparent pixels show white behind them.

    Raises:
        VtrError: values that are not finite, or one value everywhere that is in none of these ranges.
    """
    if image.mode.startswith(("I", "F")):
        return _levels(image).convert("RGB")
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, (*_WHITE, 255)), above).convert("RGB")


def _levels(image: Image.Image) -> Image.Image:
    """Returns an image of one channel with more than 8 bits, as one of mode L."""
    values = np.asarray(image)
    if not values.size:
        return image.convert("L")
    if not np.isfinite(values).all():
        raise VtrError(f"image: a pixel of mode {image.mode} is not a finite number; replace NaN and infinity before it is shown")
    low, high = _limits(image, float(values.min()), float(values.max()))
    gray = (values.astype(np.float64) - low) * (255 / (high - low))
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # TIFF: 0 is white; Pillow turns it round for 8 bits only
        gray = 255 - gray
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # PNG: pixels of this value are transparent
        gray[values == clear] = 255
    return Image.fromarray(gray.clip(0, 255).round().astype(np.uint8))


def _limits(image: Image.Image, least: float, most: float) -> tuple[float, float]:
    """Returns the values that are shown black and white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # Pillow opens some 16-bit files as I
        return 0, _SIXTEEN_BITS
    scales, slack = ((1, 255, _SIXTEEN_BITS), _OVERSHOOT) if image.mode == "F" else ((255, _SIXTEEN_BITS), 0)
    for white in scales:
        if -slack * max(most, 0) <= least and most <= (1 + slack) * white:
            return 0, white
    if least == most:
        raise VtrError(
            f"image: all pixels of mode {image.mode} are {least:g}, so nothing says what is black and white; scale the values to 0 to 255 first"
        )
    return least, most
