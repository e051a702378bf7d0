"""Runs jobs on workers: one result file per finished cell, finished cells never again, failed ones recorded, several processes on one folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vtr.eval.run import results
from vtr.eval.run.claims import Claim
from vtr.eval.run.failures import Failure, clear_failure, failure_path, read_failure, write_failure
from vtr.eval.run.setup import Setup
from vtr.eval.run.workers import Job, Pool

POLL_S = 0.5


class Listener(Protocol):
    """Is told what happens."""

    def problem(self, text: str) -> None:
        """Hears of a file in the way that cannot be trusted, or of another thing worth a line."""

    def planned(self, total: int, finished: int, failed: int) -> None:
        """Hears how many cells there are, how many have a result, and how many a recorded failure that is not tried again."""

    def started(self, job: Job) -> Callable[[int], None]:
        """Hears that a cell begins; returns a function that is told the number of samples after each batch."""

    def ended(self, job: Job, failure: Failure | None) -> None:
        """Hears that a cell has a result, or a failure."""

    def waiting(self, count: int) -> None:
        """Hears that only cells are left that other processes run."""


class Silent:
    """A listener that does nothing."""

    def problem(self, text: str) -> None:
        """See `Listener`."""

    def planned(self, total: int, finished: int, failed: int) -> None:
        """See `Listener`."""

    def started(self, job: Job) -> Callable[[int], None]:
        """See `Listener`."""
        return lambda count: None

    def ended(self, job: Job, failure: Failure | None) -> None:
        """See `Listener`."""

    def waiting(self, count: int) -> None:
        """See `Listener`."""


@dataclass
class Done:
    """What became of the jobs.

    Args:
        fingerprints: of every job in order, as it ran.
        failures: jobs without result and why, those recorded earlier included.
        ran: cells that this call ran to a result.
    """

    fingerprints: list[dict[str, Any]]
    failures: list[tuple[Job, Failure]] = field(default_factory=list)
    ran: int = 0


@dataclass
class _Item:
    job: Job
    fingerprint: dict[str, Any]
    path: Path
    places: list[int]
    claim: Claim | None = None
    advance: Callable[[int], None] = lambda count: None


def run_jobs(jobs: Sequence[Job], folder: Path, pool: Pool, listener: Listener | None = None, retry: bool = True) -> Done:
    """Runs the jobs that have no result yet.

    Args:
        jobs: equal ones are run once.
        folder: for results, exists.
        pool: who runs them.
        listener: hears what happens.
        retry: try cells again that failed earlier; False counts their recorded failures.

    Raises:
        OSError: a result cannot be written; a folder where one belongs is named before anything runs.
        ValueError, VtrError: a model of the jobs does not exist or is not complete.
    """
    listener = listener or Silent()
    items, done = _items(jobs, folder, pool)
    for problem in results.read_folder(folder, {item.path for item in items})[1]:
        listener.problem(problem)
    todo: list[_Item] = []
    for item in items:
        if _finished(item, listener):
            continue
        failure = None if retry else _recorded(item)
        if failure:
            done.failures.append((item.job, failure))
        else:
            clear_failure(folder, item.fingerprint)
            todo.append(item)
    listener.planned(len(items), len(items) - len(todo) - len(done.failures), len(done.failures))
    running: dict[Path, _Item] = {}
    try:
        while todo or running:
            for item in _claimed(todo, pool, done):
                item.advance = listener.started(item.job)
                running[item.path] = item
                pool.start(item.path, item.job, item.advance)
            if running:
                key, outcome = pool.wait()
                item = running[Path(str(key))]
                failure = _file_outcome(item, outcome, folder, done, listener)
                _release(running.pop(item.path))
                listener.ended(item.job, failure)
            elif todo:
                listener.waiting(len(todo))
                time.sleep(POLL_S)
    finally:
        for item in running.values():
            _release(item)
    return done


def _items(jobs: Sequence[Job], folder: Path, pool: Pool) -> tuple[list[_Item], Done]:
    around = {setup: pool.describe(setup) for setup in dict.fromkeys(job.setup for job in jobs)}
    prints = [around[job.setup].fingerprint(job.cell) for job in jobs]
    items: dict[Path, _Item] = {}
    for place, (job, fingerprint) in enumerate(zip(jobs, prints, strict=True)):
        path = results.cell_path(folder, fingerprint)
        if path.is_dir():
            raise OSError(f"out: {path} is a folder where a result belongs; move it away")
        items.setdefault(path, _Item(job, fingerprint, path, [])).places.append(place)
    return list(items.values()), Done(prints)


def _claimed(todo: list[_Item], pool: Pool, done: Done) -> Iterator[_Item]:
    """Takes from `todo` what free workers can begin, with a claim; drops what another process has finished or failed meanwhile."""
    while todo and (free := pool.free()):
        for item in _in_order(todo, free):
            claim = Claim.take(item.path)
            if claim is None:
                continue
            todo.remove(item)
            item.claim = claim
            failure = _recorded(item)
            if failure is None and not _finished(item):
                yield item
            else:
                _release(item)
                if failure:
                    done.failures.append((item.job, failure))
            break
        else:
            return


def _in_order(todo: list[_Item], loaded: list[Setup | None]) -> list[_Item]:
    """Returns the cells of models that a free worker has, then the others."""
    return sorted(todo, key=lambda item: item.job.setup not in loaded)


def _finished(item: _Item, listener: Listener | None = None) -> bool:
    """Tells whether there is a result that can be trusted; a file that cannot is in the way and will be written again."""
    if not item.path.exists() and not item.path.is_symlink():
        return False
    try:
        return bool(results.read_cell(item.path)["fingerprint"] == item.fingerprint)
    except results.ResultError as error:
        if listener:
            listener.problem(f"{error}; the cell is run again")
        return False


def _recorded(item: _Item) -> Failure | None:
    content = read_failure(failure_path(item.path.parent, item.fingerprint))
    return Failure(content["error"], content["kind"], content["traceback"]) if content else None


def _file_outcome(item: _Item, outcome: dict[str, Any] | Failure, folder: Path, done: Done, listener: Listener) -> Failure | None:
    if isinstance(outcome, Failure):
        write_failure(folder, item.fingerprint, outcome)
        done.failures.append((item.job, outcome))
        return outcome
    path = results.write_cell(folder, **outcome)
    if path != item.path:  # another kind of machine in a cluster
        listener.problem(f"{item.job.cell.label}: ran under other conditions than planned, its result is {path.name}")
    for place in item.places:
        done.fingerprints[place] = outcome["fingerprint"]
    done.ran += 1
    return None


def _release(item: _Item) -> None:
    if item.claim:
        item.claim.release()
