"""Tasks of lmms-eval as tasks of ours, under the name `lmms:NAME`: their samples, prompts and scores, our batches, fingerprints and result files.

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
from vtr.types.naming import closest

SOURCE = "lmms"
FRAMES = 8  # of a video, unless the name of the task says another number
_log = logging.getLogger(__name__)


@register_task_source(SOURCE, "lmms-eval")
def benchmark(name: str) -> Task:
    """Returns the task of lmms-eval called `name`; its samples are downloaded when they are first needed.

    Raises:
        ValueError: no such task, lmms-eval is not installed, or the task does not generate answers.
    """
    manager = _manager()
    if manager is None:
        raise ValueError(f"task {_full_name(name)!r} needs lmms-eval, which is not installed; pip install 'visual-token-reduction[eval]'")
    known = [key for key, entry in manager.task_index.items() if entry["type"] in ("task", "python_task")]
    if name not in known:
        raise ValueError(f"unknown task {name!r} of lmms-eval{closest(name, known)}")
    config = manager._get_config(name)
    kind = config.get("output_type", "generate_until")
    if kind != "generate_until":
        raise ValueError(
            f"task {_full_name(name)!r}: output_type must be generate_until, got {kind}; use `python -m lmms_eval` for this one"
        )
    return Task(
        name=_full_name(name),
        version=f"lmms-eval {version('lmms-eval')}",
        sha256=_sources(Path(manager._get_yaml_path(name)).parent),
        families=(name,),
        samples=lambda limit: Documents(name, limit),
        is_correct=_not_by_text,
        max_new_tokens=int(config.get("generation_kwargs", {}).get("max_new_tokens", 64)),
        remote=True,
        judge=lambda sample, prediction: _judge(name, sample, prediction),
        metrics=lambda limit, predictions: _metrics(name, limit, predictions),
    )


def _full_name(name: str) -> str:
    return f"{SOURCE}:{name}"


@dataclass(frozen=True)
class Document:
    """One sample; images are decoded when they are needed.

    Args:
        name: of the task.
        number: place among its documents.
        frames: most of a video.
    """

    name: str
    number: int
    frames: int = FRAMES

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

        return [read_visual(visual, self.frames) for visual in _task(self.name).doc_to_visual(self.content) or ()]

    @property
    def images(self) -> list[Image.Image]:
        """Images and frames as RGB, in order."""
        return [image for one in self.visuals for image in ([one] if isinstance(one, Image.Image) else one.frames)]

    @property
    def image(self) -> Image.Image:
        """The first."""
        return self.images[0]


class Documents(Sequence[Document]):
    """The first `limit` samples of a task; a slice makes new ones, so that images go with their batch."""

    def __init__(self, name: str, limit: int | None, frames: int = FRAMES) -> None:
        self._name, self._frames = name, frames
        self._numbers = range(min(limit or len(_documents(name)), len(_documents(name))))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: Any) -> Any:
        found = [Document(self._name, n, self._frames) for n in self._numbers[at]] if isinstance(at, slice) else self._numbers[at]
        return found if isinstance(found, list) else Document(self._name, found, self._frames)


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
    for document, prediction in zip(Documents(name, limit), predictions, strict=True):
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
    loaded = _manager().load_task_or_group([name], task_type="simple")
    return loaded[name]


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
