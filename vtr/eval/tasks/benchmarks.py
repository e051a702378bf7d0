"""Tasks of lmms-eval as tasks of ours, under the name `lmms:NAME`: their samples, prompts and scores, our batches, fingerprints and result files.

Videos are shown as videos to models that have them, and as images to others.

Only tasks that generate one answer per sample. `correct` of a sample is the task's own score, between 0 and 1; what the task computes from all
samples (MME's points, POPE's F1) is computed by its own functions and stored as `metrics` in the summary.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from PIL import Image

from vtr.data.frames import Video
from vtr.eval.tasks.registry import register_task_source
from vtr.eval.tasks.task import Task
from vtr.types import VtrError
from vtr.types.errors import WrongValue
from vtr.types.naming import closest

SOURCE = "lmms"
FRAMES = 8  # of a video, unless the name of the task says another number
_log = logging.getLogger(__name__)


@register_task_source(SOURCE, "lmms-eval")
def benchmark(name: str) -> Task:
    """Returns the task, or group of tasks, of lmms-eval called `name`; its samples are downloaded when they are first needed.

    `NAME@N` shows N frames of a video. The tasks of a group are the families of the whole.

    Raises:
        ValueError: no such task, lmms-eval is not installed, the task does not generate answers, or frames of what has no videos.
    """
    manager = _manager()
    if manager is None:
        raise WrongValue(f"task {_full_name(name)!r} needs lmms-eval, which is not installed; pip install 'visual-token-reduction[eval]'")
    asked, at, count = name.partition("@")
    known = {key: entry["type"] for key, entry in manager.task_index.items() if entry["type"] in ("task", "python_task", "group")}
    if asked not in known:
        raise WrongValue(f"unknown task {asked!r} of lmms-eval{closest(asked, list(known))}")
    names = tuple(_members(manager, asked)) if known[asked] == "group" else (asked,)
    configs = [_config(manager, one) for one in names]
    kinds = sorted({config.get("output_type", "generate_until") for config in configs})
    if kinds != ["generate_until"]:
        raise WrongValue(
            f"task {_full_name(asked)!r}: output_type must be generate_until, got {' and '.join(kinds)}; use `python -m lmms_eval` for this one"
        )
    frames = FRAMES if any((config.get("dataset_kwargs") or {}).get("video") for config in configs) else None
    if at:
        if frames is None or not count.isdecimal() or int(count) < 1:
            rule = "has no videos" if frames is None else "the number of frames behind @ must be 1 or more"
            raise WrongValue(f"task {_full_name(asked)!r}: {rule}, got @{count}; write {_full_name(asked)}")
        frames = int(count)
    return Task(
        name=_full_name(name),
        version=f"lmms-eval {version('lmms-eval')}",
        sha256=_sources(Path(manager._get_yaml_path(asked)).parent),
        families=names,
        samples=lambda limit: Documents(names, limit, frames or FRAMES),
        is_correct=_not_by_text,
        max_new_tokens=max(int((config.get("generation_kwargs") or {}).get("max_new_tokens", 64)) for config in configs),
        remote=True,
        judge=lambda sample, prediction: _judge(sample.name, sample, prediction),
        metrics=lambda limit, predictions: _metrics(names[0], limit, predictions) if len(names) == 1 else {},
        frames=frames,
    )


def _config(manager: Any, name: str) -> Any:
    """Returns the YAML of a task; its functions, which may need packages of their own, are left out."""
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(manager._get_yaml_path(name), mode="simple")


def _members(manager: Any, group: str) -> list[str]:
    """Returns the tasks of a group and of the groups inside it, in order."""
    found: list[str] = []
    for member in _config(manager, group)["task"]:
        if not isinstance(member, str):
            raise WrongValue(f"task {_full_name(group)!r}: is a group whose tasks are made inside it; name one task of lmms-eval")
        found += _members(manager, member) if manager.task_index[member]["type"] == "group" else [member]
    return list(dict.fromkeys(found))


def _full_name(name: str) -> str:
    return f"{SOURCE}:{name}"


@dataclass(frozen=True)
class Document:
    """One sample; images and videos are decoded when they are needed.

    Args:
        name: of the task.
        number: place among its documents.
        most_frames: of a video.
    """

    name: str
    number: int
    most_frames: int = FRAMES

    @property
    def id(self) -> str:
        """Task and place."""
        return f"{self.name}-{self.number}"

    @property
    def family(self) -> str:
        """The task."""
        return self.name

    @cached_property
    def content(self) -> Any:
        """The document as the task's functions take it."""
        return _documents(self.name)[self.number]

    @property
    def question(self) -> str:
        """Prompt text by the task's own function."""
        return str(_task(self.name).doc_to_text(self.content))

    @property
    def answer(self) -> str:
        """What is right, as text."""
        return str(_task(self.name).doc_to_target(self.content))

    @property
    def visuals(self) -> list[Image.Image | Video]:
        """Images as RGB, and videos, in order."""
        from vtr.eval.lmms.prompts import read_visual

        return [read_visual(visual, self.most_frames) for visual in _task(self.name).doc_to_visual(self.content) or ()]

    @property
    def images(self) -> list[Image.Image]:
        """Images and frames as RGB, in order."""
        return [image for one in self.visuals for image in ([one] if isinstance(one, Image.Image) else one.frames)]

    @property
    def image(self) -> Image.Image:
        """The first."""
        return self.images[0]


class Documents(Sequence[Document]):
    """The first `limit` samples of every task; a slice makes new ones, so that images go with their batch."""

    def __init__(self, names: Sequence[str], limit: int | None, frames: int = FRAMES) -> None:
        self._places = [(name, number) for name in names for number in range(min(limit or len(_documents(name)), len(_documents(name))))]
        self._frames = frames

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [Document(name, number, self._frames) for name, number in self._places[at]]
        name, number = self._places[at]
        return Document(name, number, self._frames)


def _judge(name: str, sample: Any, prediction: str) -> float:
    values = _task(name).process_results(sample.content, [prediction])
    shares = [share for share in map(share_of, values.values()) if share is not None]
    if not shares:
        raise VtrError(
            f"{_full_name(name)}: gives no outcome of single samples ({', '.join(values)}); use `python -m lmms_eval` for this one"
        )
    return shares[0]


def share_of(value: Any) -> float | None:
    """Returns how right one sample is, from one entry of a task's `process_results`: a number, or a mapping with a score, or with what was said and
    what is right; None for anything else."""
    if isinstance(value, Real):
        return min(max(float(value), 0.0), 1.0)
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("score"), Real):
        return min(max(float(value["score"]), 0.0), 1.0)
    said = next((value[key] for key in ("parsed_pred", "pred", "prediction") if key in value), None)
    right = next((value[key] for key in ("answer", "ground_truth") if key in value), None)
    return None if said is None or right is None else float(_same(said, right))


def _same(said: Any, right: Any) -> bool:
    if isinstance(said, list):
        return any(_same(one, right) for one in said)
    if isinstance(right, list):
        return any(_same(said, one) for one in right)
    given, wanted = (str(text).strip().lower().rstrip(".") for text in (said, right))
    letter = len(wanted) == 1 and wanted.isalpha()
    return given == wanted or (letter and given.lstrip("(")[:1] == wanted and not given.lstrip("(")[1:2].isalnum())


def _metrics(name: str, limit: int | None, predictions: Sequence[str]) -> dict[str, float]:
    """Returns what the task makes of all samples; metrics that want an outside judge or a file are left out."""
    task = _task(name)
    found: dict[str, list[Any]] = {}
    for document, prediction in zip(Documents([name], limit), predictions, strict=True):
        for metric, value in task.process_results(document.content, [prediction]).items():
            found.setdefault(metric, []).append(value)
    metrics = {}
    for metric, function in task.aggregation().items():
        needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if metric not in found or len(needed) > 1:
            continue
        try:
            value = function(found[metric])
        except Exception as error:  # a stranger's function on few samples; the outcomes of the samples are there
            _log.warning("%s: metric %s could not be computed (%s)", _full_name(name), metric, error)
            continue
        if isinstance(value, Real):
            metrics[metric] = float(value)
    return metrics


def _not_by_text(prediction: str, answer: str) -> bool:
    raise VtrError("tasks of lmms-eval judge by the whole sample; ask Task.outcome")


@cache
def _manager() -> Any:
    try:
        from lmms_eval.tasks import TaskManager
    except ImportError:
        return None

    return _warnings_only(TaskManager)()


def _warnings_only(manager: type) -> type:
    """Returns a subclass of lmms-eval's `TaskManager` that logs warnings but not a line per file of a task nobody asked for.

    lmms-eval 0.7.3 keeps loguru's global logger as `self.logger`, which has no level of its own: changing it would change the logging of the
    whole process. The subclass therefore answers `self.logger` with a filter, and ignores what the constructor assigns to that name.
    """

    class Quiet(manager):  # type: ignore[misc]
        @property
        def logger(self) -> _Warnings:
            return _Warnings()

        @logger.setter
        def logger(self, given: Any) -> None:
            pass

    return Quiet


class _Warnings:
    """Hands everything from a warning on to loguru's logger."""

    def __getattr__(self, name: str) -> Any:
        from loguru import logger

        return getattr(logger, name) if name not in ("debug", "info") else lambda *_args, **_kwargs: None


@cache
def _task(name: str) -> Any:
    try:
        return _manager().load_task_or_group([name], task_type="simple")[name]
    except ModuleNotFoundError as error:
        raise VtrError(
            f"task {_full_name(name)!r} of lmms-eval needs the package {error.name!r}, which is not installed; install it"
        ) from None


@cache
def _documents(name: str) -> Any:
    return _task(name).eval_docs


@cache
def _sources(folder: Path) -> str:
    """Returns the sha256 of the files that define the task."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml", "")):
        if file.is_file():
            total.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
