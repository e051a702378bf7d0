"""The picture of a comparison behind every step, with the token that was asked about."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from vtr.ui.explain import Explanation
from vtr.ui.session import Column, Comparison
from vtr.ui.steps import left_after
from vtr.viz import draw_patches, patch_boxes

TOKEN, TARGET = (255, 0, 200), (0, 200, 255)
"""Colours of the token that was asked about, and of the one that it was merged into."""

ONE_VIEW_PX = 720


def draw_full(found: Comparison) -> Image.Image:
    """Returns the picture that the full model saw."""
    column = next((one for one in found.columns if isinstance(one, Column)), None)
    return draw_patches(found.views, None if column is None else column.entry, _width(found), plain=True)


def draw_step(found: Comparison, number: int, steps: int | None = None, asked: Explanation | None = None) -> Image.Image:
    """Returns the picture behind some steps of a method.

    Args:
        found: the comparison; number: of the method in it.
        steps: how many of its steps have run; None for all.
        asked: a token to outline, with what it was merged into.
    """
    column = found.column(number)
    entry, resized = _entry_after(column, len(column.taken) if steps is None else steps)
    picture = draw_patches(found.views, entry, _width(found), resized=resized)
    if asked is None:
        return picture
    boxes, draw = patch_boxes(found.views, entry, _width(found)), ImageDraw.Draw(picture)
    if asked.target is not None:
        draw.line((boxes.centre(asked.token), boxes.centre(asked.target)), fill=TARGET, width=3)
        _outline(draw, boxes[asked.target], TARGET)
    _outline(draw, boxes[asked.token], TOKEN)
    return picture


def token_at(found: Comparison, number: int, x: int, y: int) -> int | None:
    """Returns the token at a pixel of that picture, None beside the views."""
    return patch_boxes(found.views, found.column(number).entry, _width(found)).at(x, y)


def _width(found: Comparison) -> int | None:
    """Returns the width of a view: large where there is one."""
    return ONE_VIEW_PX if len(found.views) == 1 else None


def _entry_after(column: Column, steps: int) -> tuple[dict[str, Any], bool]:
    """Returns the entry of the report as it was behind some steps, and whether the picture was smaller then."""
    if column.resized:
        return (column.entry, True) if steps else ({**column.entry, "retained": column.entry["tokens"]}, False)
    kept, into = left_after(column.entry["tokens"], column.taken[:steps])
    merged = any(step.pivots for step in column.taken[:steps])
    own = set(kept)
    assignment = [token if token in own else into.get(token, -1) for token in column.entry["tokens"]] if merged else None
    return {**column.entry, "retained": kept, "assignment": assignment}, False


def _outline(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline="black", width=1)
    draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=color, width=3)
