"""Textured scenes with coloured shapes and printed signs, drawn with integers only.

A scene is drawn at 384 pixels for an input of 192, so lengths here are twice as long as a model sees them. Training also
draws smaller canvases with the same object sizes. All randomness comes from raw Philox words and all pixels from integer
comparisons, so that every machine draws the same bytes.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from vtr.types.errors import WrongValue

from . import glyphs

CANVAS = 384
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS = {
    "red": (210, 35, 35),
    "green": (40, 165, 55),
    "blue": (40, 75, 220),
    "yellow": (240, 220, 45),
    "orange": (245, 130, 25),
    "purple": (125, 45, 170),
    "pink": (250, 150, 200),
    "cyan": (55, 215, 225),
}
SIZES = {"small": (15, 19), "large": (29, 36)}  # smallest and largest radius in pixels at 384
SIGNS = {"white": ((235, 235, 235), (20, 20, 20)), "black": ((20, 20, 20), (235, 235, 235))}  # plate, ink
CELL = 4  # side of a glyph's cell: print is 28 pixels high, 14 at 192
PITCH = 24  # from one character to the next
LATTICE = 8  # corners of signs are multiples of this


class Dice:
    """Random integers from raw Philox words, which numpy keeps stable (its distributions it does not)."""

    def __init__(self, stream: int, index: int):
        self._bits = np.random.Philox(key=(stream << 64) | index)
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """Returns an integer in `[0, n)`."""
        if not self._words:
            self._words = self._bits.random_raw(64).tolist()
        return (self._words.pop() >> 11) % n

    def between(self, low: int, high: int) -> int:
        """Returns an integer in `[low, high]`."""
        return low + self.below(high - low + 1)

    def pick(self, options):
        """Returns one of a sequence."""
        return options[self.below(len(options))]

    def shuffled(self, options) -> list:
        """Returns a permutation of a sequence."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]

    def bytes(self, count: int) -> np.ndarray:
        """Returns `(count,)` uint8."""
        return self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


@dataclass(frozen=True)
class Item:
    """A coloured shape; centre and radius in pixels."""

    shape: str
    color: str
    size: str
    x: int
    y: int
    radius: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom; the last two are not covered any more."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius + 1, self.y + self.radius + 1


@dataclass(frozen=True)
class Sign:
    """A printed plate; `left` and `top` are its corner in pixels."""

    text: str
    color: str
    left: int = 0
    top: int = 0
    height: ClassVar[int] = 40

    @property
    def width(self) -> int:
        return PITCH * (len(self.text) + 1)

    def middle(self, n: int) -> tuple[int, int]:
        """Returns the middle of character `n`, (x, y)."""
        return self.left + PITCH * (n + 1), self.top + self.height // 2

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom; the last two are not covered any more."""
        return self.left, self.top, self.left + self.width, self.top + self.height


@dataclass(frozen=True)
class Scene:
    """What is in a picture; `size` is the side of the square canvas, `seed` makes its texture."""

    size: int
    seed: tuple[int, int]
    items: tuple[Item, ...] = ()
    signs: tuple[Sign, ...] = field(default=())


def is_free(box: tuple[int, int, int, int], taken: list[tuple[int, int, int, int]], gap: int = 4) -> bool:
    """Tells whether a box keeps a gap to all others."""
    left, top, right, bottom = box
    return all(left >= r + gap or right + gap <= a or top >= b + gap or bottom + gap <= t for a, t, r, b in taken)


def arrange(dice: Dice, size: int, wanted: list[tuple[str, str, str]], signs: list[Sign], tries: int = 30) -> Scene | None:
    """Places shapes and signs without overlap.

    Args:
        dice: randomness.
        size: side of the canvas.
        wanted: (shape, color, size) of each item, in order of placement after the signs.
        signs: signs whose corners are to be chosen.
        tries: positions tried per object.

    Returns:
        The scene, or None where an object found no place.
    """
    taken: list[tuple[int, int, int, int]] = []
    placed: list[Sign] = []
    items: list[Item] = []
    for sign in signs:
        for _ in range(tries):
            left, top = (LATTICE * dice.between(0, (size - side) // LATTICE) for side in (sign.width, sign.height))
            candidate = Sign(sign.text, sign.color, left, top)
            if is_free(candidate.box, taken):
                break
        else:
            return None
        taken.append(candidate.box)
        placed.append(candidate)
    for shape, color, kind in wanted:
        radius = dice.between(*SIZES[kind])
        for _ in range(tries):
            x, y = dice.between(radius + 2, size - radius - 3), dice.between(radius + 2, size - radius - 3)
            item = Item(shape, color, kind, x, y, radius)
            if is_free(item.box, taken):
                break
        else:
            return None
        taken.append(item.box)
        items.append(item)
    return Scene(size, (dice.below(1 << 40), dice.below(1 << 40)), tuple(items), tuple(placed))


def mask(shape: str, radius: int) -> np.ndarray:
    """Returns the ink of a shape `(2 * radius + 1, 2 * radius + 1)` bool."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) * 8 <= radius * 7
    if shape == "triangle":
        return 2 * abs(x) <= y + radius
    if shape == "diamond":
        return abs(x) + abs(y) <= radius
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) * 3 <= radius
    if shape == "ring":
        return (x * x + y * y <= radius * radius) & (9 * (x * x + y * y) >= 4 * radius * radius)
    raise WrongValue(f"mask: unknown shape {shape!r}; choose from {SHAPES}")


def background(dice: Dice, size: int) -> np.ndarray:
    """Returns grey texture `(size, size, 3)` uint8, all below 213: soft clouds, stripes or checks, and fine grain."""
    cells = size // 32 + 1
    along = np.arange(size)
    weights = np.zeros((size, cells), dtype=np.float32)  # integers below 2^24 stay exact in float32, whatever the order of sums
    weights[along, along // 32] = 32 - along % 32
    weights[along, along // 32 + (along % 32 > 0)] += along % 32
    clouds = weights @ dice.bytes(cells * cells).reshape(cells, cells).astype(np.float32) @ weights.T
    texture = (clouds.astype(np.int32) >> 10).astype(np.uint8) // 5  # 0..51
    period, kind = dice.between(6, 20), dice.below(4)
    bands, other = along // period % 2, (along + dice.below(period)) // period % 2
    if kind == 1:
        texture += (bands[:, None] * 16).astype(np.uint8)
    elif kind == 2:
        texture += (bands[None, :] * 16).astype(np.uint8)
    elif kind == 3:
        texture += (bands.astype(np.uint8)[:, None] ^ other.astype(np.uint8)[None, :]) * np.uint8(14)
    texture += dice.bytes(size * size).reshape(size, size) >> 4  # 0..15
    base = dice.between(45, 110)
    return np.stack([texture + np.uint8(base + dice.below(21)) for _ in range(3)], axis=-1)


def tone(dice: Dice, color: str) -> np.ndarray:
    """Returns a color a little off its name `(3,)` int16."""
    return np.array([channel + dice.between(-12, 12) for channel in COLORS[color]], dtype=np.int16)


def grain(dice: Dice, side: int) -> np.ndarray:
    """Returns noise from -8 to 7 `(side, side, 1)` int16."""
    return (dice.bytes(side * side).reshape(side, side, 1) >> 4).astype(np.int16) - 8


def draw_item(picture: np.ndarray, item: Item, color: np.ndarray, noise: np.ndarray) -> None:
    """Draws an item in place; what lies outside the picture is cut off.

    Args:
        picture: `(size, size, 3)` uint8.
        item: what to draw.
        color: its tone `(3,)` int16.
        noise: its grain, at least as large as its box, `(side, side, 1)` int16.
    """
    size, (left, top, right, bottom) = len(picture), item.box
    rows, cols = slice(max(0, -top), min(size, bottom) - top), slice(max(0, -left), min(size, right) - left)
    ink = mask(item.shape, item.radius)[rows, cols]
    shaded = (color + noise[rows, cols]).clip(0, 255).astype(np.uint8)
    np.copyto(picture[max(0, top) : bottom, max(0, left) : right], shaded, where=ink[..., None])


def draw_sign(picture: np.ndarray, sign: Sign) -> None:
    """Draws a sign in place into `picture` `(size, size, 3)` uint8."""
    left, top, right, bottom = sign.box
    plate, ink = (np.array(tone, dtype=np.uint8) for tone in SIGNS[sign.color])
    picture[top:bottom, left:right] = plate
    for n, character in enumerate(sign.text):
        x, y = sign.middle(n)
        cells = glyphs.glyph(character).repeat(CELL, 0).repeat(CELL, 1)
        rows, cols = cells.shape
        np.copyto(picture[y - rows // 2 :, x - cols // 2 :][:rows, :cols], ink, where=cells[..., None])


def draw(scene: Scene) -> np.ndarray:
    """Draws a scene.

    Returns:
        `(size, size, 3)` uint8 RGB.
    """
    dice = Dice(*scene.seed)
    picture = background(dice, scene.size)
    noise = grain(dice, 128)
    for item in scene.items:
        draw_item(picture, item, tone(dice, item.color), noise)
    for sign in scene.signs:
        draw_sign(picture, sign)
    return picture
