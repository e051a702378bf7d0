"""Workers on Ray: one machine or many, each holding a model; a worker that dies is replaced and its cell runs again.

Results come back to the process that runs the sweep, which alone writes files, so that machines need no common file system.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from vtr.eval.run.failures import Failure
from vtr.eval.run.setup import Setup
from vtr.eval.run.workers import Advance, Job, Surroundings, Worker
from vtr.types import VtrError
from vtr.types.errors import MissingPackage, WrongValue

MOST_DEATHS = 3
_STORE_BYTES = 256 * 2**20  # answers are small; models never go through Ray's object store


@dataclass
class _Hand:
    """One actor and what it holds."""

    actor: Any
    loaded: Setup | None = None
    busy: bool = False


@dataclass
class _Task:
    key: Hashable
    job: Job
    hand: _Hand
    advance: Advance
    deaths: int = 0


class RayPool:
    """See `vtr.eval.run.workers.Pool`; use it as a context manager.

    Args:
        address: of a cluster (`auto`, `host:port`, `ray://host:port`), or `local` to start one on this machine that ends with the block.
        workers: how many.
        cpus, gpus: that one worker reserves; `gpus` may be a fraction, None is one where the cluster has any.
        threads: of torch in each worker.

    Raises:
        VtrError: Ray is not installed, the cluster cannot be reached or has no worker's worth of resources.
    """

    def __init__(self, address: str, workers: int, cpus: float = 1, gpus: float | None = None, threads: int = 1) -> None:
        if workers < 1:
            raise WrongValue(f"jobs: must be at least 1, got {workers}")
        try:
            import ray
        except ImportError:
            raise MissingPackage.of("sweep: --ray", "ray", "eval", "leave --ray and --jobs out to run in this process") from None
        _check_address(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts a cluster; it would report home
        self._ray = ray
        local = {"num_cpus": max(1, round(workers * cpus)), "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        try:
            ray.init(
                address=None if address == "local" else address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(local if address == "local" else {}),
            )
        except Exception as error:  # Ray raises many kinds, plain Exception among them
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise VtrError(f"ray: no cluster at {address!r} could be joined or started ({first}); leave --ray out to run without") from None
        have = ray.cluster_resources()
        gpus = float(have.get("GPU", 0) > 0) if gpus is None else gpus
        if have.get("CPU", 0) < cpus or have.get("GPU", 0) < gpus:
            ray.shutdown()
            raise VtrError(
                f"ray: a worker needs {cpus:g} CPU and {gpus:g} GPU, the cluster has {have.get('CPU', 0):g} and {have.get('GPU', 0):g}; "
                "lower workers.cpus or workers.gpus"
            )
        self._make = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0).remote
        self._threads = threads
        self._hands = [_Hand(self._actor()) for _ in range(workers)]
        self._tasks: dict[Any, _Task] = {}
        self._again: deque[_Task] = deque()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_error: object) -> None:
        self._ray.shutdown()

    def describe(self, setup: Setup) -> Surroundings:
        """See `Pool`; errors come out as the worker raised them.

        Raises:
            VtrError: workers die as soon as they start.
        """
        for _ in range(MOST_DEATHS):
            try:
                return self._ray.get(self._hands[0].actor.describe.remote(setup))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                reason = str(error).splitlines()[0]
                self._hands[0] = _Hand(self._actor())
        raise VtrError(f"ray: {MOST_DEATHS} workers died before they had done anything ({reason}); is the machine out of memory?")

    def free(self) -> list[Setup | None]:
        """See `Pool`; none while a cell waits for its next attempt."""
        return [] if self._again else [hand.loaded for hand in self._hands if not hand.busy]

    def start(self, key: Hashable, job: Job, advance: Advance) -> None:
        """See `Pool`; the samples of a cell are told when it ends, all at once."""
        self._submit(_Task(key, job, self._hands[0], advance))

    def wait(self) -> tuple[Hashable, dict[str, Any] | Failure]:
        """See `Pool`."""
        while True:
            while self._again and any(not hand.busy for hand in self._hands):
                self._submit(self._again.popleft())
            (ready,), _ = self._ray.wait(list(self._tasks), num_returns=1)
            task = self._tasks.pop(ready)
            try:
                outcome = self._ray.get(ready)
            except self._ray.exceptions.RayTaskError as error:  # not the cell, which reports its own errors: what carries it
                outcome = Failure(str(error.cause).splitlines()[0], type(error.cause).__name__, str(error))
            except self._ray.exceptions.RayError as error:
                dead = self._replace(task, error)
                if dead is None:
                    continue
                outcome = dead
            task.hand.busy = False
            if not isinstance(outcome, Failure):
                task.advance(len(outcome["samples"]))
            return task.key, outcome

    def _submit(self, task: _Task) -> None:
        idle = [hand for hand in self._hands if not hand.busy]
        task.hand = next((hand for hand in idle if hand.loaded == task.job.setup), idle[0])
        task.hand.busy, task.hand.loaded = True, task.job.setup
        self._tasks[task.hand.actor.run.remote(task.job)] = task

    def _replace(self, task: _Task, error: Exception) -> Failure | None:
        """Replaces a dead worker; returns None when its cell will run again."""
        task.deaths += 1
        position = self._hands.index(task.hand)
        self._hands[position] = task.hand = _Hand(self._actor())
        if task.deaths < MOST_DEATHS:
            self._again.append(task)
            return None
        reason = f"the worker died {task.deaths} times while it ran this cell, out of memory perhaps"
        return Failure(reason, type(error).__name__, str(error))

    def _actor(self) -> Any:
        return self._make(threads=self._threads)


def _check_address(address: str) -> None:
    """Refuses an address where nothing answers; Ray itself would wait for minutes.

    Raises:
        VtrError: nobody listens there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise VtrError(f"ray: no cluster at {address!r} ({error}); start one with `ray start --head`, or leave --ray out") from None
