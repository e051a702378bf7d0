"""Short clips of noise, and a task that asks about them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vtr.eval.tasks import Task

FRAMES = 6


def noise(count: int = FRAMES, seed: int = 0) -> list[Image.Image]:
    """Frames of 96 x 64 pixels."""
    return [Image.fromarray(frame) for frame in np.random.default_rng(seed).integers(0, 256, (count, 64, 96, 3), dtype=np.uint8)]


@dataclass(frozen=True)
class Clip:
    """One question about one clip."""

    id: str
    count: int = FRAMES
    family: str = "moves"
    question: str = "what moves?"
    answer: str = "circle"

    @property
    def frames(self) -> list[Image.Image]:
        """The clip, drawn when it is asked for."""
        return noise(self.count, int(self.id))


def clips_task(kind: type[Clip] = Clip) -> Task:
    """Returns a task of three questions."""
    return Task("clips", "v1", "0" * 64, ("moves",), lambda limit: [kind(str(i)) for i in range(3)][:limit], str.__eq__, 3, frames=FRAMES)
