"""`shapes` v1: a generated visual question answering benchmark, the same on every machine.

2500 questions, 500 in each of five families that lose different things when visual tokens go: existence (balanced yes/no,
absent objects share their color and their shape with present ones), attribute, counting, relation and reading small print.
Every question has its own scene. Test scenes come from a random stream of their own.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from PIL import Image

from vtr.types.errors import WrongValue

from .questions import ASKERS, MOST_COUNTED, Question, compose
from .scenes import COLORS, SHAPES, Dice, Scene, draw

VERSION = "v1"
FAMILIES = ("existence", "attribute", "counting", "relation", "text")
PER_FAMILY = 500
TEST_SHA256 = "58726d127af2cb85cd1b559bbed2850382907cacedda3d2427da5945e78ad587"
STREAMS = {"test": 1, "validation": 2, "train": 3, "examples": 4}  # scenes of different streams never share a seed
ANSWERS = {  # asked for in turn, so that every answer is as frequent as its share here
    "existence": ("yes", "no"),
    "attribute": tuple(COLORS) * 3 + SHAPES,
    "counting": tuple(str(n) for n in range(1, MOST_COUNTED + 1)),
    "relation": ("left", "right", "above", "below"),
    "text": (None,),
}


@dataclass(frozen=True)
class Sample:
    """One question about one scene; the image is drawn when it is needed (about 5 ms)."""

    id: str
    family: str
    question: str
    answer: str
    scene: Scene

    @property
    def image(self) -> Image.Image:
        """RGB, 384 x 384."""
        return Image.fromarray(draw(self.scene))


def _sample(split: str, family: str, index: int) -> Sample:
    """Draws scenes until one allows a question with the answer whose turn it is."""
    dice = Dice(STREAMS[split], (FAMILIES.index(family) << 32) | index)
    turns = ANSWERS[family]
    answer = turns[index % len(turns)]
    while True:
        scene = compose(dice)
        fitting: list[Question] = [q for q in ASKERS[family](dice, scene) if answer in (None, q.answer)]
        if fitting:
            question = dice.pick(fitting)
            return Sample(f"shapes-{VERSION}/{family}/{index:03d}", family, question.text, question.answer, scene)


@cache
def _family(split: str, family: str, count: int) -> tuple[Sample, ...]:
    return tuple(_sample(split, family, index) for index in range(count))


def split_samples(split: str, family: str | None = None, limit: int | None = None) -> list[Sample]:
    """Returns the samples of one random stream, see `test_samples`.

    Raises:
        ValueError: unknown split or family, or a limit outside 1 to 500.
    """
    if split not in STREAMS:
        raise WrongValue(f"shapes: unknown split {split!r}; choose from {', '.join(STREAMS)}")
    if family is not None and family not in FAMILIES:
        raise WrongValue(f"shapes: unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    if limit is not None and not 1 <= limit <= PER_FAMILY:
        raise WrongValue(f"shapes: limit must be from 1 to {PER_FAMILY}, got {limit}")
    return [s for name in ([family] if family else FAMILIES) for s in _family(split, name, limit or PER_FAMILY)]


def test_samples(family: str | None = None, limit: int | None = None) -> list[Sample]:
    """Returns the test split.

    Args:
        family: one of `FAMILIES`; None for all, in that order.
        limit: the first so many of each family; None for all 500.

    Returns:
        Samples with ids such as `shapes-v1/text/017`.
    """
    return split_samples("test", family, limit)


test_samples.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test


def _chunks(limit: int | None) -> Iterator[bytes]:
    for sample in test_samples(limit=limit):
        yield draw(sample.scene).tobytes()
        yield f"{sample.id}\n{sample.question}\n{sample.answer}\n".encode()


def test_digest(limit: int | None = None) -> str:
    """Returns the sha256 over pixels, ids, questions and answers of the test split; that of all (takes about 15 s) must equal `TEST_SHA256`.

    Args:
        limit: only the first so many of each family.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(limit):
        digest.update(chunk)
    return digest.hexdigest()


test_digest.__test__ = False  # type: ignore[attr-defined]


def is_correct(prediction: str, answer: str) -> bool:
    """Tells whether two answers are equal after lower case, stripped blanks and one trailing full stop."""
    return _normal(prediction) == _normal(answer)


def _normal(text: str) -> str:
    return text.strip().lower().removesuffix(".").strip()


def constant_accuracy(family: str) -> float:
    """Returns the accuracy in percent (0 to 100) of the best constant answer to one family of the test split."""
    answers = Counter(sample.answer for sample in test_samples(family))
    return 100 * answers.most_common(1)[0][1] / answers.total()
