"""`shapes-video` v1: a generated benchmark of questions about short clips, the same on every machine.

1000 questions, 200 in each of five families: order (which comes first), motion (four directions), events (how many times it blinks), needle
(a word that one frame shows) and attribute (of an item that is in all frames). Order and motion cannot be answered from one frame or from
shuffled frames, except that shuffled frames still tell in which axis something moves. Every question has its own clip. There are 8 frames,
or 16 of other clips, in a split of their own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cache

from PIL import Image

from vtr.types.errors import WrongValue

from .clip_questions import ASKERS
from .clips import DIRECTIONS, MOST_BLINKS, TICKS, Clip, compose_clip, draw_clip
from .frames import FrameQuestion
from .questions import is_there, named_in
from .scenes import Dice
from .shapes import ANSWERS as ANSWERS_OF_PICTURES
from .shapes import STREAMS

VERSION = "v1"
FAMILIES = tuple(ASKERS)
PER_FAMILY = 200
FRAMES = (TICKS, 2 * TICKS)
TEST_SHA256 = {
    8: "90fe534a1665f13954a04e8f518453c75ae86b164471cbd153edc5eb37d1f8ef",
    16: "c9b1548e259cf405fb1f98ffd64ece09dea24b79a1df7f2bf6b73eba20fc6e44",
}
MOVING_PICTURES = 1 << 56  # added to a stream: no clip shares its seed with a picture
ANSWERS: dict[str, tuple[str | None, ...]] = {  # asked for in turn, so that every answer is as frequent as its share here
    "order": ("before", "after"),
    "motion": tuple(DIRECTIONS),
    "events": tuple(str(n) for n in range(1, MOST_BLINKS + 1)),
    "needle": (None,),
    "attribute": ANSWERS_OF_PICTURES["attribute"],
}


@dataclass(frozen=True)
class VideoSample:
    """One question about one clip; the frames are drawn when they are needed (about 1 ms each)."""

    id: str
    family: str
    question: str
    answer: str
    clip: Clip

    @property
    def frame_question(self) -> FrameQuestion:
        """What a model for pictures of the same world is asked of one frame, in words it was trained on: whether an item that the question names
        is there; where it names none by color and shape, the question itself, and how sure the answer is."""
        named = named_in(self.question)
        return FrameQuestion(tuple(map(is_there, named))) if named else FrameQuestion((self.question,), ())

    @property
    def frames(self) -> list[Image.Image]:
        """RGB, 192 x 192 each."""
        return [Image.fromarray(picture) for picture in draw_clip(self.clip)]


def _sample(split: str, family: str, index: int, frames: int) -> VideoSample:
    """Draws clips until one allows a question with the answer whose turn it is."""
    dice = Dice(STREAMS[split] + MOVING_PICTURES, (frames << 48) | (FAMILIES.index(family) << 32) | index)
    turns = ANSWERS[family]
    answer = turns[index % len(turns)]
    while True:
        clip = compose_clip(dice, frames)
        fitting = [question for question in ASKERS[family](clip) if answer in (None, question.answer)]
        if fitting:
            question = dice.pick(fitting)
            name = f"shapes-video-{VERSION}/{frames}/{family}/{index:03d}"
            return VideoSample(name, family, question.text, question.answer, clip)


@cache
def _family(split: str, family: str, count: int, frames: int) -> tuple[VideoSample, ...]:
    return tuple(_sample(split, family, index, frames) for index in range(count))


def split_samples(split: str, family: str | None = None, limit: int | None = None, frames: int = TICKS) -> list[VideoSample]:
    """Returns the samples of one random stream, see `test_samples`.

    Raises:
        ValueError: unknown split or family, a limit outside 1 to 200, or another number of frames than 8 or 16.
    """
    if split not in STREAMS:
        raise WrongValue(f"shapes-video: unknown split {split!r}; choose from {', '.join(STREAMS)}")
    if family is not None and family not in FAMILIES:
        raise WrongValue(f"shapes-video: unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    if limit is not None and not 1 <= limit <= PER_FAMILY:
        raise WrongValue(f"shapes-video: limit must be from 1 to {PER_FAMILY}, got {limit}")
    if frames not in FRAMES:
        raise WrongValue(f"shapes-video: frames must be 8 or 16, got {frames}")
    return [s for name in ([family] if family else FAMILIES) for s in _family(split, name, limit or PER_FAMILY, frames)]


def test_samples(family: str | None = None, limit: int | None = None, frames: int = TICKS) -> list[VideoSample]:
    """Returns the test split.

    Args:
        family: one of `FAMILIES`; None for all, in that order.
        limit: the first so many of each family; None for all 200.
        frames: of a clip, 8 or 16.

    Returns:
        Samples with ids such as `shapes-video-v1/8/needle/017`.
    """
    return split_samples("test", family, limit, frames)


test_samples.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test


def test_digest(frames: int = TICKS, limit: int | None = None) -> str:
    """Returns the sha256 over pixels, ids, questions and answers of the test split; that of all (takes about 10 s) must equal `TEST_SHA256[frames]`.

    Args:
        frames: of a clip, 8 or 16.
        limit: only the first so many of each family.
    """
    digest = hashlib.sha256()
    for sample in test_samples(frames=frames, limit=limit):
        digest.update(draw_clip(sample.clip).tobytes())
        digest.update(f"{sample.id}\n{sample.question}\n{sample.answer}\n".encode())
    return digest.hexdigest()


test_digest.__test__ = False  # type: ignore[attr-defined]


def constant_accuracy(family: str, frames: int = TICKS) -> float:
    """Returns the accuracy in percent (0 to 100) of the best constant answer to one family of the test split."""
    answers = Counter(sample.answer for sample in test_samples(family, frames=frames))
    return 100 * answers.most_common(1)[0][1] / answers.total()
