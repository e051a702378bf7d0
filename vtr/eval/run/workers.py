"""Workers: what loads a model once and answers cell after cell on it, in this process; `vtr.eval.run.cluster` has the same on Ray."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from vtr.eval.frame_scores import FrameScorer, TaskScores
from vtr.eval.run.cells import Cell, fingerprint
from vtr.eval.run.failures import Failure, failure_of
from vtr.eval.run.runner import Runner, cell_host
from vtr.eval.run.setup import Setup, noted, sketch
from vtr.hosts._protocol import host_of
from vtr.models.loading import Checkpoint, check_attention, check_device, check_dtype, find_checkpoint, identify, load_config, load_model
from vtr.models.pixels import OWN_LIMITS
from vtr.types.errors import WrongValue

_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A cell on a model."""

    setup: Setup
    cell: Cell


@dataclass(frozen=True)
class Surroundings:
    """Everything in a fingerprint that is not the cell's own, known without loading weights."""

    identity: dict[str, Any]
    dtype: torch.dtype
    attention: str
    device: str
    model_type: str
    setup: Setup
    scorer: dict[str, Any] | None = None

    def fingerprint(self, cell: Cell) -> dict[str, Any]:
        """Returns what `Runner.fingerprint` will say."""
        shown = noted(cell_host(host_of(sketch(self.setup)), cell, self.setup.visuals), True) if cell.task.frames else {}
        around = (self.identity, self.dtype, self.attention, self.device, self.model_type, self.setup.pixels, shown, self.scorer)
        return fingerprint(cell, *around)


def describe(
    setup: Setup, checkpoint: Checkpoint | None = None, identity: dict[str, Any] | None = None, scorer: dict[str, Any] | None = None
) -> Surroundings:
    """Returns the surroundings of a setup on this machine.

    Args:
        setup: the model and how it is loaded.
        checkpoint, identity: where the config is and what the model is called in fingerprints, where that is known without asking the hub.
        scorer: from `scorer_of`, where that is known so, too.

    Raises:
        ValueError: unknown model, device, dtype or attention backend.
        VtrError: the checkpoint is incomplete or its config unreadable.
    """
    checkpoint = checkpoint or find_checkpoint(setup.model)
    device, attention = check_device(setup.device), check_attention(setup.attention)
    config = load_config(checkpoint)
    dtype = check_dtype(setup.dtype, device, config)
    return Surroundings(identity or identify(checkpoint), dtype, attention, device, config.model_type, setup, scorer or scorer_of(setup))


def scorer_of(setup: Setup, checkpoint: Checkpoint | None = None, identity: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Returns what the model that scores frames is called in fingerprints, and its type; None without one. Arguments as for `describe`.

    Raises:
        ValueError: unknown model.
    """
    if setup.frame_scores is None:
        return None
    try:
        checkpoint = checkpoint or find_checkpoint(setup.frame_scores)
    except WrongValue as error:
        raise WrongValue(f"frame_scores: {str(error).removeprefix('model: ')}") from None
    return {**(identity or identify(checkpoint)), "model_type": load_config(checkpoint).model_type}


Load = Callable[[Setup], tuple[Any, Any]]
Advance = Callable[[int], None]


def load(setup: Setup) -> tuple[Any, Any]:
    """Loads model and processor of a setup."""
    return load_model(setup.model, setup.device, setup.dtype, setup.attention, pixels=setup.pixels)


class Worker:
    """Holds one model at a time, loaded when the first cell asks for it.

    Args:
        load: how models are loaded.
        threads: of torch on the CPU; None leaves them as they are.
    """

    def __init__(self, load: Load = load, threads: int | None = None) -> None:
        self._load = load
        self._setup: Setup | None = None
        self._runner: Runner | None = None
        self._failure: Failure | None = None
        if threads is not None:
            torch.set_num_threads(threads)

    def describe(self, setup: Setup) -> Surroundings:
        """Calls `describe` where this worker runs."""
        return describe(setup)

    def process(self) -> int:
        """Returns the id of the process that it runs in."""
        return os.getpid()

    def run(self, job: Job, advance: Advance = lambda count: None) -> dict[str, Any] | Failure:
        """Runs a cell and returns the parts of its result, or why there are none; the worker lives on."""
        if job.setup != self._setup:
            self._change(job.setup)
        if self._runner is None:
            assert self._failure is not None
            return self._failure
        try:
            return self._runner.measure(job.cell, advance)
        except Exception as error:  # whatever a cell does, the others are to run
            _log.debug("%s failed", job.cell.label, exc_info=error)
            return failure_of(error)
        finally:
            _free_memory()

    def _change(self, setup: Setup) -> None:
        self._runner = self._failure = None
        _free_memory()  # before the next model comes
        self._setup = setup
        try:
            model, processor = self._load(setup)
            identity = identify(find_checkpoint(setup.model))
            device = str(setup.device or model.device)
            asked = (setup.batch_size, setup.share_tower, setup.pixels, setup.visuals, scorer_of(setup))
            self._runner = Runner(model, processor, identity, setup.attention, device, *asked, self._scores(setup, model.dtype))
        except Exception as error:  # all cells of this model fail with it, those of others run
            _log.debug("%s could not be loaded", setup.model, exc_info=error)
            self._failure = failure_of(error)

    def _scores(self, setup: Setup, dtype: torch.dtype) -> TaskScores | None:
        """Returns what scores frames, as exactly as the model computes; its weights are loaded when the first cell needs them."""
        if setup.frame_scores is None:
            return None
        scorer = replace(setup, model=setup.frame_scores, dtype=str(dtype).removeprefix("torch."), pixels=OWN_LIMITS)
        return TaskScores(lambda: FrameScorer(*self._load(scorer)))


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Pool(Protocol):
    """Some workers."""

    def describe(self, setup: Setup) -> Surroundings:
        """As the workers see it."""

    def free(self) -> list[Setup | None]:
        """Returns what is loaded in each worker that has nothing to do."""

    def start(self, key: Hashable, job: Job, advance: Advance) -> None:
        """Gives a job to a free worker, one that has its model if there is one."""

    def wait(self) -> tuple[Hashable, dict[str, Any] | Failure]:
        """Returns the next job that ended, with the outcome of `Worker.run`."""


class LocalPool:
    """One worker in this process; `start` does the work."""

    def __init__(self, load: Load = load) -> None:
        self._worker = Worker(load)
        self._loaded: Setup | None = None
        self._ended: tuple[Hashable, dict[str, Any] | Failure] | None = None

    def describe(self, setup: Setup) -> Surroundings:
        """See `Pool`."""
        return self._worker.describe(setup)

    def free(self) -> list[Setup | None]:
        """See `Pool`."""
        return [self._loaded] if self._ended is None else []

    def start(self, key: Hashable, job: Job, advance: Advance) -> None:
        """See `Pool`."""
        self._loaded = job.setup
        self._ended = (key, self._worker.run(job, advance))

    def wait(self) -> tuple[Hashable, dict[str, Any] | Failure]:
        """See `Pool`."""
        assert self._ended is not None
        ended, self._ended = self._ended, None
        return ended
