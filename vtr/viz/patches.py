"""One picture per image or video: retained patches as the model saw them, removed ones dimmed, merged ones tinted like their pivot and linked to it.

Drawn on the pixels that entered the tower, so crops, resizing and padding of the processor are shown as they were. AnyRes images show
their thumbnail on the left and the canvas of crops on the right; other views stand in rows. Of views that a method made
smaller every token is drawn as large as what it covers. Frames of a video stand in rows, each with what was retained of it under it; merged
patches have the colour of their pivot in whichever frame that is, without lines.
"""

from __future__ import annotations

import colorsys
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtr.types.errors import WrongValue
from vtr.viz.sheet import fitted

VIEW_PX = 480
FRAME_PX = 240
GAP = 12
_CAPTION = 22
_DIM = 0.3  # brightness left of a removed patch
_PADDING = 225  # patches that never were visual tokens
_MANY_LINKS = 150
_ONE_ROW = 4  # views
_MOST_IN_ROW = 8  # frames


def draw_patches(
    views: np.ndarray,
    image: Mapping[str, Any] | None = None,
    view_px: int | None = None,
    *,
    resized: bool = False,
    labels: Sequence[str] = (),
    plain: bool = False,
) -> Image.Image:
    """Draws the picture of one image or video.

    Args:
        views: `(V, H, W, 3)` uint8 from `views_from_inputs`, or frames.
        image: its entry of `Report.to_dict()["images"]`; None draws the image without any reduction.
        view_px: width of one view in the picture; None for 480, and 240 of a frame.
        resized: the method made the views smaller in front of the tower and nothing removed tokens after that; the report tells a token by
            the patch of the whole grid at its centre.
        labels: of the frames of a video, such as times; their numbers where there are none.
        plain: only the views, where they are with the entry.

    Raises:
        ValueError: fewer views than the report speaks of.
    """
    frames = image is not None and image.get("kind") == "video"
    sheet, boxes, image = _laid_out(views, image, view_px, resized)
    if image is None or plain:
        return sheet
    shaded = _shade(sheet, image, boxes)
    return _captions(shaded, image, boxes, labels) if frames else _links(shaded, image, boxes)


def patch_boxes(views: np.ndarray, image: Mapping[str, Any], view_px: int | None = None) -> Boxes:
    """Returns where every patch is in the picture that `draw_patches` draws of the same arguments."""
    return _laid_out(views, image, view_px, False)[1]


def _laid_out(
    views: np.ndarray, image: Mapping[str, Any] | None, view_px: int | None, resized: bool
) -> tuple[Image.Image, Boxes, Mapping[str, Any] | None]:
    """Returns the views on one sheet, where the patches are on it, and the entry in patches that these are."""
    if image and image.get("grids"):
        return *_canvas(Image.fromarray(views[0]), image, view_px or VIEW_PX), image
    count, frames = image["views"] if image else len(views), image is not None and image.get("kind") == "video"
    if len(views) < count:
        raise WrongValue(f"draw_patches: the report has {count} views, got pixels of {len(views)}")
    view_px = view_px or (FRAME_PX if frames else VIEW_PX)
    height = round(view_px * views.shape[1] / views.shape[2])
    pictures = [Image.fromarray(view) for view in views[:count]]
    if image and resized and image["retained"]:
        grid = _smaller_grid(image)
        rows, cols = (side * n // full for side, n, full in zip(views.shape[1:3], grid, image["patch_grid"], strict=True))  # in pixels
        pictures = [picture.resize((cols, rows), Image.Resampling.BICUBIC) for picture in pictures]
        image = _on_grid(image, grid)
    scaled = [picture.resize((view_px, height), Image.Resampling.LANCZOS) for picture in pictures]
    crops = tuple(image["crop_grid"]) if image else (0, 0)
    places = _places_of_frames(count, (view_px, height)) if frames else _places(count, crops, (view_px, height))
    extent = (max(x for x, _ in places) + view_px, max(y for _, y in places) + height + _CAPTION * frames)
    sheet = Image.new("RGB", extent, "white")
    for view, place in zip(scaled, places, strict=True):
        sheet.paste(view, place)
    return sheet, Boxes([tuple(image["patch_grid"]) if image else (1, 1)] * count, places, [(view_px, height)] * count), image


def _places_of_frames(count: int, view: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns the top left corner of every frame: in rows of up to eight, as full as can be, with room for a line under each."""
    fewest = min(math.ceil(math.sqrt(count)), _MOST_IN_ROW)
    across = count if count <= _ONE_ROW else min(range(fewest, _MOST_IN_ROW + 1), key=lambda across: -count % across)
    return [(index % across * (view[0] + GAP), index // across * (view[1] + _CAPTION + GAP)) for index in range(count)]


def _captions(picture: Image.Image, image: Mapping[str, Any], boxes: Boxes, labels: Sequence[str]) -> Image.Image:
    """Writes under every frame how many of its tokens were retained; in red where nothing is left, not even merged into others."""
    font, draw = ImageFont.load_default(_CAPTION - 8), ImageDraw.Draw(picture)
    retained, tokens, merged = map(boxes.by_view, (image["retained"], image["tokens"], merged_in(image)))
    for number, (_, (left, top), (width, height)) in enumerate(boxes.views):
        label = labels[number] if number < len(labels) else str(number + 1)
        text = fitted(f"{label}: {retained[number]} of {tokens[number]}", font, width)
        draw.text((left, top + height + 2), text, fill="black" if retained[number] or merged[number] else "#b91c1c", font=font)
    return picture


def _canvas(thumbnail: Image.Image, image: Mapping[str, Any], view_px: int) -> tuple[Image.Image, Boxes]:
    """Returns a thumbnail and, beside it, the canvas that the model interpolated: the same picture in its own shape."""
    tall, wide = image["image_size"]
    sizes = [(view_px, round(view_px * thumbnail.height / thumbnail.width)), (2 * view_px, round(2 * view_px * tall / wide))]
    places = [(0, 0), (view_px + GAP, 0)]
    sheet = Image.new("RGB", (3 * view_px + GAP, max(height for _, height in sizes)), "white")
    for size, place in zip(sizes, places, strict=True):
        sheet.paste(thumbnail.resize(size, Image.Resampling.LANCZOS), place)
    return sheet, Boxes([tuple(grid) for grid in image["grids"]], places, sizes)


def _smaller_grid(image: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the patch grid `(rows, cols)` that all views were resized to: that of the first, of which unpadding cuts nothing off."""
    rows, cols = image["patch_grid"]
    first = [patch for patch in image["retained"] if patch < rows * cols]
    return len({patch // cols for patch in first}), len({patch % cols for patch in first})


def _on_grid(image: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, Any]:
    """Returns the entry with the patches of a smaller grid in place of the patches at their centres."""
    (rows, cols), (down, across) = image["patch_grid"], grid
    row, col = ([(2 * i + 1) * full // (2 * n) for i in range(n)] for full, n in ((rows, down), (cols, across)))
    centres = [(view * rows + r) * cols + c for view in range(image["views"]) for r in row for c in col]
    tokens, retained = (
        [cell for cell, centre in enumerate(centres) if centre in had] for had in (set(image["tokens"]), set(image["retained"]))
    )
    return {**image, "patch_grid": grid, "tokens": tokens, "retained": retained, "assignment": None}


def _places(count: int, crops: tuple[int, ...], view: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns the top left corner of every view: the thumbnail first, crops as a canvas beside it; other views in rows, up to four in one."""
    width, height = view
    rows, cols = crops or (0, 0)
    if count == 1 or rows * cols != count - 1:
        across = count if count <= _ONE_ROW else math.ceil(math.sqrt(count))
        return [(index % across * (width + GAP), index // across * (height + GAP)) for index in range(count)]
    return [(0, 0), *((width + GAP + col * width, row * height) for row in range(rows) for col in range(cols))]


class Boxes:
    """Pixel boxes of patches by id: the first of its view, and on in raster order of the view's grid."""

    def __init__(self, grids: Sequence[tuple[int, ...]], places: list[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> None:
        self.views = list(zip(grids, places, sizes, strict=True))
        self.ends = list(accumulate(rows * cols for rows, cols in grids))

    def all(self) -> range:
        """Returns the ids of all patches of all views."""
        return range(self.ends[-1])

    def __getitem__(self, patch: int) -> tuple[int, int, int, int]:
        view = bisect_right(self.ends, patch)
        (rows, cols), (x, y), (width, height) = self.views[view]
        row, col = divmod(patch - (self.ends[view - 1] if view else 0), cols)
        return x + col * width // cols, y + row * height // rows, x + (col + 1) * width // cols, y + (row + 1) * height // rows

    def at(self, x: int, y: int) -> int | None:
        """Returns the patch at a pixel, None between the views."""
        for view, ((rows, cols), (left, top), (width, height)) in enumerate(self.views):
            if left <= x < left + width and top <= y < top + height:
                first = self.ends[view - 1] if view else 0
                row, col = (
                    ((at - start + 1) * count - 1) // size for at, start, count, size in ((y, top, rows, height), (x, left, cols, width))
                )
                return first + row * cols + col
        return None

    def by_view(self, patches: Iterable[int]) -> list[int]:
        """Returns how many of some patches every view has."""
        counts = [0] * len(self.views)
        for patch in patches:
            counts[bisect_right(self.ends, patch)] += 1
        return counts

    def centre(self, patch: int) -> tuple[int, int]:
        """Returns the middle of a patch."""
        left, top, right, bottom = self[patch]
        return (left + right) // 2, (top + bottom) // 2


def merged_in(image: Mapping[str, Any]) -> dict[int, int]:
    """Returns patch -> pivot, for patches that were merged into another one."""
    if not image.get("assignment"):
        return {}
    pairs = zip(image["tokens"], image["assignment"], strict=True)
    return {patch: pivot for patch, pivot in pairs if pivot >= 0 and pivot != patch}


def _colors(pivots: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """Returns colours for pivots: neighbours get far apart hues (golden ratio), the same on every run."""
    found = {}
    for index, pivot in enumerate(sorted(pivots)):
        red, green, blue = colorsys.hsv_to_rgb(index * 0.618033988749895 % 1, 0.75, 0.95)
        found[pivot] = (round(255 * red), round(255 * green), round(255 * blue))
    return found


def _shade(sheet: Image.Image, image: Mapping[str, Any], boxes: Boxes) -> Image.Image:
    """Dims what was removed, tints what was merged, outlines what was retained."""
    merged = merged_in(image)
    colors = _colors(sorted(set(merged.values())))
    retained, tokens = set(image["retained"]), set(image["tokens"])
    pixels = np.asarray(sheet).astype(np.float32)
    for patch in boxes.all():
        left, top, right, bottom = boxes[patch]
        cell = pixels[top:bottom, left:right]
        if patch in merged:
            cell[:] = cell * 0.45 + np.asarray(colors[merged[patch]], dtype=np.float32) * 0.4
        elif patch not in tokens:
            cell[:] = _PADDING
        elif patch not in retained:
            cell[:] = cell.mean(-1, keepdims=True) * _DIM
    shaded = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(shaded)
    for patch in sorted(retained):
        left, top, right, bottom = boxes[patch]
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colors.get(patch, (255, 221, 0)), width=2 if patch in colors else 1)
    return shaded


def _links(picture: Image.Image, image: Mapping[str, Any], boxes: Boxes) -> Image.Image:
    """Draws a line from every merged patch to its pivot; of too many, which would hide the picture, only the tint is left."""
    merged = merged_in(image)
    if not merged or len(merged) > _MANY_LINKS:
        return picture
    colors = _colors(sorted(set(merged.values())))
    draw = ImageDraw.Draw(picture)
    for patch, pivot in merged.items():
        draw.line((boxes.centre(patch), boxes.centre(pivot)), fill=colors[pivot], width=1)
    return picture
