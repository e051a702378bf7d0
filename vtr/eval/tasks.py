"""Tasks by name: samples with an image, a question and an answer, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vtr.registry import closest


class Sample(Protocol):
    """One question; `image` may be drawn or read only when it is asked for."""

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
    """

    name: str
    version: str
    sha256: str
    families: tuple[str, ...]
    samples: Callable[[int | None], Sequence[Sample]]
    is_correct: Callable[[str, str], bool]
    max_new_tokens: int
    remote: bool = False

    @property
    def identity(self) -> dict[str, str]:
        """For fingerprints."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}


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
    """The task called `name`.

    Raises:
        ValueError: no such task.
    """
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}{closest(name, list_tasks())}")
    return _TASKS[name]()
