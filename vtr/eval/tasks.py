"""Tasks by name: samples with an image, a question and an answer, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vtr.types.naming import closest


class Sample(Protocol):
    """One question; `image` may be drawn or read only when it is asked for. A sample of several images has them as `images`, too."""

    @property
    def id(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def image(self) -> Any: ...


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
    """

    name: str
    version: str
    sha256: str
    families: tuple[str, ...]
    samples: Callable[[int | None], Sequence[Sample]]
    is_correct: Callable[[str, str], bool]
    max_new_tokens: int
    remote: bool = False
    judge: Callable[[Any, str], float] | None = None
    metrics: Callable[[int | None, Sequence[str]], dict[str, float]] | None = None

    @property
    def identity(self) -> dict[str, str]:
        """For fingerprints."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}

    def outcome(self, sample: Sample, prediction: str) -> bool | float:
        """How right an answer is: a bool, or 0 to 1."""
        return self.judge(sample, prediction) if self.judge else self.is_correct(prediction, sample.answer)


def _shapes() -> Task:
    from vtr.data import shapes

    return Task(
        name="shapes",
        version=shapes.VERSION,
        sha256=shapes.TEST_SHA256,
        families=tuple(shapes.FAMILIES),
        samples=lambda limit: shapes.test_samples(limit=limit),
        is_correct=shapes.is_correct,
        max_new_tokens=16,
    )


_TASKS: dict[str, Callable[[], Task]] = {"shapes": _shapes}


def register_task(name: str) -> Callable[[Callable[[], Task]], Callable[[], Task]]:
    """Decorator: the function that builds the task called `name`."""

    def decorate(build: Callable[[], Task]) -> Callable[[], Task]:
        if _TASKS.setdefault(name, build) is not build:
            raise ValueError(f"register_task: {name!r} is taken; choose another name")
        return build

    return decorate


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted(_TASKS)


def get_task(name: str) -> Task:
    """The task called `name`; `lmms:NAME` is one of lmms-eval.

    Raises:
        ValueError: no such task.
    """
    if name.startswith("lmms:"):
        from vtr.eval.benchmarks import benchmark

        return benchmark(name.removeprefix("lmms:"))
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}{closest(name, list_tasks())}; those of lmms-eval are written lmms:NAME")
    return _TASKS[name]()
