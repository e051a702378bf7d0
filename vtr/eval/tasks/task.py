"""A task: samples with an image or a video, a question and an answer, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Sample(Protocol):
    """One question, and what it is about, which may be drawn or read only when it is needed: an `image`; several `images`; the `frames` of one video,
    a list of images; or `visuals`, a list of images and `vtr.data.frames.Video`. A sample with videos may have a `frame_question`, a
    `vtr.data.frames.FrameQuestion`: what a second model is asked of single frames.
    """

    @property
    def id(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Task:
    """A set of samples with one score.

    Args:
        name, version, sha256: what identifies the samples.
        families: groups of samples; the score of the task is the unweighted mean of theirs.
        samples: `(limit) -> samples`, at most `limit` of each family.
        is_correct: `(prediction, answer)`.
        max_new_tokens: enough for the longest answer.
        remote: the samples may have to be downloaded, so that nobody should ask for them just to count them.
        judge: `(sample, prediction) -> 0 to 1`, instead of `is_correct` where more than the answer is needed.
        metrics: `(limit, predictions in order) -> numbers` of the task's own making, in its units.
        frames: most frames of a video of a sample; None where samples have images.
    """

    name: str
    version: str
    sha256: str
    families: tuple[str, ...]
    samples: Callable[[int | None], Sequence[Any]]
    is_correct: Callable[[str, str], bool]
    max_new_tokens: int
    remote: bool = False
    judge: Callable[[Any, str], float] | None = None
    metrics: Callable[[int | None, Sequence[str]], dict[str, float]] | None = None
    frames: int | None = None

    @property
    def identity(self) -> dict[str, str]:
        """For fingerprints."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}

    def outcome(self, sample: Sample, prediction: str) -> bool | float:
        """Returns how right an answer is: a bool, or 0 to 1."""
        return self.judge(sample, prediction) if self.judge else self.is_correct(prediction, sample.answer)
