"""Names of tasks, and sources that have many tasks under names of their own, written `SOURCE:NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vtr.eval.tasks.task import Task
from vtr.types.errors import WrongValue
from vtr.types.naming import closest

Build = Callable[[], Task]
BuildNamed = Callable[[str], Task]


class _Source(NamedTuple):
    owner: str
    build: BuildNamed


_TASKS: dict[str, Build] = {}
_SOURCES: dict[str, _Source] = {}


def register_task(name: str) -> Callable[[Build], Build]:
    """Decorator: the function that builds the task called `name`."""

    def decorate(build: Build) -> Build:
        if _TASKS.setdefault(name, build) is not build:
            raise WrongValue(f"register_task: {name!r} is taken; choose another name")
        return build

    return decorate


def register_task_source(prefix: str, owner: str) -> Callable[[BuildNamed], BuildNamed]:
    """Decorator: the function that builds the task `PREFIX:NAME` from `NAME`.

    Args:
        prefix: what users write before the colon.
        owner: whose tasks these are, for messages.
    """

    def decorate(build: BuildNamed) -> BuildNamed:
        if _SOURCES.setdefault(prefix, _Source(owner, build)).build is not build:
            raise WrongValue(f"register_task_source: {prefix!r} is taken; choose another prefix")
        return build

    return decorate


def list_tasks() -> list[str]:
    """Returns the names of all tasks that belong to no source, sorted."""
    return sorted(_TASKS)


def get_task(name: str) -> Task:
    """Returns the task called `name`, or `SOURCE:NAME` of a registered source.

    Raises:
        ValueError: no such task.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _SOURCES:
        return _SOURCES[prefix].build(rest)
    if name not in _TASKS:
        others = "".join(f"; those of {source.owner} are written {prefix}:NAME" for prefix, source in _SOURCES.items())
        raise WrongValue(f"unknown task {name!r}{closest(name, list_tasks())}{others}")
    return _TASKS[name]()


def name_in_source(name: str) -> str:
    """Returns `NAME` of `SOURCE:NAME` and `SOURCE:NAME@FRAMES`, and any other name as it is."""
    prefix, colon, rest = name.partition(":")
    return rest.partition("@")[0] if colon and prefix in _SOURCES else name
