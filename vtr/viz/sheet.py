"""A contact sheet: pictures in rows and columns with captions, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from vtr.types.errors import WrongValue

_MARGIN = 16
_TEXT = 17


class Tile(NamedTuple):
    """One picture with its caption; `good` colours the caption green, red, or leaves it black (None)."""

    picture: Image.Image
    caption: str
    good: bool | None = None


def contact_sheet(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Tile]]], tile_px: int = 300) -> Image.Image:
    """Draws the sheet.

    Args:
        title: first line.
        columns: heading of each column.
        rows: heading of each row (a question) and its tiles, one per column.
        tile_px: width of a tile; pictures are scaled to it, all to one height.

    Raises:
        ValueError: a row with another number of tiles than there are columns.
    """
    for heading, tiles in rows:
        if len(tiles) != len(columns):
            raise WrongValue(f"contact_sheet: row {heading!r} has {len(tiles)} tiles for {len(columns)} columns")
    font, bold = ImageFont.load_default(_TEXT), ImageFont.load_default(_TEXT + 5)
    line = _TEXT + 8
    height = max(round(tile_px * t.picture.height / t.picture.width) for _, tiles in rows for t in tiles)
    row_height = 2 * line + height + _MARGIN
    width = _MARGIN + len(columns) * (tile_px + _MARGIN)
    top = _MARGIN + 2 * line + 8
    sheet = Image.new("RGB", (width, top + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), fitted(title, bold, width - 2 * _MARGIN), fill="black", font=bold)
    for index, column in enumerate(columns):
        x = _MARGIN + index * (tile_px + _MARGIN)
        draw.text((x, _MARGIN + line + 8), fitted(column, font, tile_px), fill="#444444", font=font)
    for number, (heading, tiles) in enumerate(rows):
        y = top + number * row_height
        draw.text((_MARGIN, y), fitted(heading, font, width - 2 * _MARGIN), fill="black", font=font)
        for index, tile in enumerate(tiles):
            x = _MARGIN + index * (tile_px + _MARGIN)
            own = round(tile_px * tile.picture.height / tile.picture.width)
            sheet.paste(tile.picture.resize((tile_px, own), Image.Resampling.LANCZOS), (x, y + line))
            color = {None: "black", True: "#15803d", False: "#b91c1c"}[tile.good]
            draw.text((x, y + line + height + 2), fitted(tile.caption, font, tile_px), fill=color, font=font)
    return sheet


def fitted(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Returns the text in one line, cut with an ellipsis where it is too long."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
