"""Short clips of drawn items that stay, come and go, blink and move, with a sign in one frame; integers only, as for pictures.

A clip lasts 8 ticks. It is shown at one frame a tick or more: the same happens, in finer steps. All frames share one background and
have grain of their own. What happens is as likely backwards, so that a frame of unknown time says nothing about order and direction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from vtr.types.errors import WrongValue

from .questions import print_text
from .scenes import (
    COLORS,
    LATTICE,
    SHAPES,
    SIGNS,
    SIZES,
    Dice,
    Item,
    Sign,
    background,
    draw_item,
    draw_sign,
    grain,
    is_free,
    tone,
)

SIDE = 192  # pixels of a frame, 96 for the model
TICKS = 8
MOST_BLINKS = 4
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STEPS = (10, 12, 14, 16)  # pixels a tick that an item moves
RIM = 8  # a moving item is there where its centre is so far inside the frame
LEAST_SEEN = 4  # ticks in which a moving item is there
DURATIONS = (2, 3)  # ticks that items which come and go are there
GAP = 2  # ticks between their beginnings
TRIES = 30
MOST_TRIES = 10_000
KINDS = ("staying", "staying", "passing", "passing", "blinking", "moving")
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Track:
    """An item over time.

    Attributes:
        kind: one of `KINDS`.
        item: the item, where it is in the first frame.
        shown: in which ticks it is there.
        step: pixels a tick, (right, down).
    """

    kind: str
    item: Item
    shown: tuple[bool, ...] = (True,) * TICKS
    step: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        return f"{self.item.color} {self.item.shape}"

    @property
    def direction(self) -> str | None:
        """Where it moves, a key of `DIRECTIONS`."""
        sign = tuple((d > 0) - (d < 0) for d in self.step)
        return next((name for name, towards in DIRECTIONS.items() if towards == sign), None)

    def at(self, frame: int, rate: int) -> Item | None:
        """Returns the item in a frame where there are `rate` frames a tick, None where it is not there."""
        if self.step == (0, 0):
            return self.item if self.shown[frame // rate] else None
        x, y = (start + step * frame // rate for start, step in zip((self.item.x, self.item.y), self.step))
        return replace(self.item, x=x, y=y) if RIM <= x < SIDE - RIM and RIM <= y < SIDE - RIM else None

    def boxes(self, rate: int) -> list[Box | None]:
        """Returns the box of the item in every frame."""
        if self.step == (0, 0):
            box = self.item.box
            return [box if self.shown[frame // rate] else None for frame in range(TICKS * rate)]
        items = [self.at(frame, rate) for frame in range(TICKS * rate)]
        return [item.box if item else None for item in items]


@dataclass(frozen=True)
class Clip:
    """What happens in a clip; `rate` frames a tick, `seed` makes background and grain, the sign is there in the frame `sign_at` only."""

    seed: tuple[int, int]
    rate: int
    tracks: tuple[Track, ...]
    sign: Sign
    sign_at: int

    @property
    def frames(self) -> int:
        return TICKS * self.rate

    def of(self, kind: str) -> list[Track]:
        """Returns the tracks of a kind."""
        return [track for track in self.tracks if track.kind == kind]

    def backwards(self) -> Clip:
        """Returns the clip whose frames are these in the opposite order, but for their grain."""
        last = self.frames - 1
        tracks = []
        for track in self.tracks:
            x, y = (start + step * last // self.rate for start, step in zip((track.item.x, track.item.y), track.step))
            back = -track.step[0], -track.step[1]
            tracks.append(replace(track, item=replace(track.item, x=x, y=y), shown=track.shown[::-1], step=back))
        return replace(self, tracks=tuple(tracks), sign_at=last - self.sign_at)


def _begins(dice: Dice) -> tuple[list[int], int]:
    """Returns when two passing items come and how long both are there: neither at the first tick nor at the last."""
    lasts = dice.pick(DURATIONS)
    latest = TICKS - 1 - lasts
    first, second = dice.pick([(a, b) for a in range(1, latest + 1) for b in range(1, latest + 1) if abs(a - b) >= GAP])
    return [first, second], lasts


def _blinks(dice: Dice) -> tuple[bool, ...]:
    """Returns ticks in which an item is there, no two of them in a row, 1 to `MOST_BLINKS`, each number as often."""
    wanted = dice.between(1, MOST_BLINKS)
    while True:
        ticks = sorted(dice.shuffled(range(TICKS))[:wanted])
        if all(b - a > 1 for a, b in pairwise(ticks)):
            return tuple(tick in ticks for tick in range(TICKS))


def _moving(dice: Dice, item: Item, rate: int) -> Track | None:
    """Puts an item on a way through the frame; None where it is there for too short."""
    pace, towards = dice.pick(STEPS), dice.pick(tuple(DIRECTIONS.values()))
    step = towards[0] * pace, towards[1] * pace
    way = (TICKS * rate - 1) * pace // rate
    start = []
    for d in towards:
        middle = dice.between(RIM - way // 2, SIDE - RIM - 1 + way // 2) if d else dice.between(RIM, SIDE - RIM - 1)
        start.append(middle - d * way // 2)
    track = Track("moving", replace(item, x=start[0], y=start[1]), step=step)
    return track if sum(box is not None for box in track.boxes(rate)) >= LEAST_SEEN * rate else None


def _fits(boxes: list[Box | None], taken: list[list[Box]]) -> bool:
    return all(box is None or is_free(box, others) for box, others in zip(boxes, taken))


def _take(boxes: list[Box | None], taken: list[list[Box]]) -> None:
    for box, others in zip(boxes, taken):
        if box:
            others.append(box)


def _arrange(dice: Dice, rate: int, sign: Sign, at: int) -> Clip | None:
    """Places everything, or returns None where something found no place; the sign is shown in the frame `at`."""
    frames = TICKS * rate
    taken: list[list[Box]] = [[] for _ in range(frames)]
    names = dice.shuffled([(shape, color) for shape in SHAPES for color in COLORS])[: len(KINDS)]
    begins, lasts = _begins(dice)
    tracks: list[Track] = []
    for kind, (shape, color) in zip(KINDS, names):
        size = dice.pick(tuple(SIZES)) if kind == "staying" else "small"
        shown = (True,) * TICKS
        if kind == "passing":
            begin = begins.pop()
            shown = tuple(begin <= tick < begin + lasts for tick in range(TICKS))
        elif kind == "blinking":
            shown = _blinks(dice)
        radius = dice.between(*SIZES[size])
        for _ in range(TRIES):
            x, y = dice.between(radius + 2, SIDE - radius - 3), dice.between(radius + 2, SIDE - radius - 3)
            item = Item(shape, color, size, x, y, radius)
            track = _moving(dice, item, rate) if kind == "moving" else Track(kind, item, shown)
            if track and _fits(track.boxes(rate), taken):
                break
        else:
            return None
        _take(track.boxes(rate), taken)
        tracks.append(track)
    for _ in range(TRIES):
        left, top = (LATTICE * dice.between(0, (SIDE - side) // LATTICE) for side in (sign.width, sign.height))
        sign = replace(sign, left=left, top=top)
        if is_free(sign.box, taken[at]):
            return Clip((dice.below(1 << 40), dice.below(1 << 40)), rate, tuple(tracks), sign, at)
    return None


def compose_clip(dice: Dice, frames: int = TICKS, free: bool = False) -> Clip:
    """Returns a random clip: two items that stay, two that come and go, one that blinks, one that moves, and a sign.

    Args:
        dice: randomness.
        frames: how many, a multiple of 8.
        free: print random letters as well as words (training).

    Raises:
        ValueError: a number of frames that is no multiple of 8.
    """
    if frames < TICKS or frames % TICKS:
        raise WrongValue(f"compose_clip: frames must be a multiple of {TICKS}, got {frames}")
    sign, at = Sign(print_text(dice, free), dice.pick(tuple(SIGNS))), dice.below(frames)  # once: as often in crowded frames
    for _ in range(MOST_TRIES):
        clip = _arrange(dice, frames // TICKS, sign, at)
        if clip:
            return clip
    raise RuntimeError("compose_clip: nothing fits")


def draw_clip(clip: Clip) -> np.ndarray:
    """Draws a clip.

    Returns:
        `(frames, 192, 192, 3)` uint8 RGB.
    """
    dice = Dice(*clip.seed)
    empty = background(dice, SIDE)
    even = np.zeros((SIDE, SIDE, 1), dtype=np.int16)
    tones = [tone(dice, track.item.color) for track in clip.tracks]
    pictures = np.stack([empty] * clip.frames)
    for frame, picture in enumerate(pictures):
        noise = grain(dice, SIDE)
        for track, color in zip(clip.tracks, tones):
            item = track.at(frame, clip.rate)
            if item:
                draw_item(picture, item, color, even)
        if frame == clip.sign_at:
            draw_sign(picture, clip.sign)
        picture[:] = (picture + noise.repeat(3, axis=2)).clip(0, 255)  # repeated: numpy is slow along short axes
    return pictures
