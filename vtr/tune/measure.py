"""Measures candidates on a model: losses by the cells of `vtr eval`, speeds by the interleaved rounds of `vtr bench`; all of it is kept in files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vtr.bench.measure import run_cell
from vtr.bench.record import KEPT, environment
from vtr.bench.tables import paired
from vtr.eval.run import results
from vtr.eval.run.asking import encode, to_model
from vtr.eval.run.setup import Setup, seen_by
from vtr.eval.run.work import Listener, run_jobs
from vtr.eval.run.workers import Job, LocalPool
from vtr.eval.stats import Interval, paired_loss
from vtr.eval.summary import condense
from vtr.files import write_atomic
from vtr.hosts._protocol import host_of
from vtr.tune.search import CannotRun, OutOfTime
from vtr.tune.space import Candidate
from vtr.tune.split import SLICES, Half, Split
from vtr.types import VtrError
from vtr.types.errors import WrongValue

ROUNDS, FINAL_ROUNDS = 9, 25
"""Counted rounds of a candidate in the search, and of the chosen one afterwards."""
FEWEST_ROUNDS = 6
"""Of so many ratios the smallest and the largest are a 95 % interval of their median; of fewer no two are."""
PROMPTS = 4
"""Different prompts that rounds take in turn."""
FORMAT, SCHEMA = "vtr-tune-speed", 1

Outcomes = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Held:
    """What samples say that had no part in the search."""

    loss: Interval
    samples: int
    full: float


class Measurer:
    """Measures candidates, each sample and each round once; a `vtr.tune.search.Evaluator`.

    Args:
        setup: the model and how it is asked.
        split: the samples.
        folder: where results are kept, and found by the next run.
        load: returns model and processor; called once, when they are needed.
        new_tokens: of the answer that is timed; 1 is the prefill.
        listener: hears of cells.
        said: hears a line about what was measured.
    """

    until: float = math.inf
    """Time of `time.monotonic()` after which nothing more begins."""

    def __init__(
        self,
        setup: Setup,
        split: Split,
        folder: Path,
        load: Callable[[], tuple[Any, Any]],
        new_tokens: int,
        listener: Listener | None = None,
        said: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.split, self._setup, self._load, self._new_tokens = split, setup, load, new_tokens
        self._cells, self._speeds = results.prepare_folder(folder / "cells"), results.prepare_folder(folder / "speeds")
        self._pool, self._listener, self._said = LocalPool(lambda _setup: load()), listener, said
        self._around = self._pool.describe(setup)
        self._known: dict[tuple[Candidate | None, Half, tuple[int, int]], Outcomes] = {}
        self._prompts: list[dict[str, Any]] | None = None
        self.losses: dict[Candidate, tuple[Interval, int]] = {}
        self.speeds: dict[Candidate, Interval] = {}
        self.retained: dict[Candidate | None, float] = {}

    def loss(self, candidate: Candidate, stage: int) -> Interval:
        """See `Evaluator`."""
        parts = self.split.slices(stage)
        full, reduced = (self._outcomes(one, "search", parts) for one in (None, candidate))
        found = paired_loss(full, reduced, self.split.weights)
        samples = _count(full)
        if self.losses.get(candidate) != (found, samples):
            self._said(
                f"{candidate.label}: loses {100 * found.value:.1f} points ({100 * found.low:.1f} to {100 * found.high:.1f}, {samples} samples)"
            )
        self.losses[candidate] = found, samples
        return found

    @property
    def accuracy(self) -> float:
        """Accuracy of the full model on the samples of the search that were run."""
        parts = [part for one, half, part in self._known if one is None and half == "search"]
        return self._score(self._outcomes(None, "search", parts))

    def held_out(self, candidate: Candidate) -> Held:
        """Returns the loss on the samples that are held out, or on as many of them as there is time for.

        Raises:
            OutOfTime: for none of them.
        """
        done: list[tuple[int, int]] = []
        for part in SLICES:
            try:
                self._outcomes(None, "held-out", [part])
                self._outcomes(candidate, "held-out", [part])
            except OutOfTime:
                if set().union(*(self._known[None, "held-out", one] for one in done)) != set(self.split.weights):
                    raise  # not yet one of every family
                break
            done.append(part)
        full, reduced = (self._outcomes(one, "held-out", done) for one in (None, candidate))
        return Held(paired_loss(full, reduced, self.split.weights), _count(full), self._score(full))

    def speed(self, candidate: Candidate, rounds: int = ROUNDS) -> Interval:
        """See `Evaluator`; `rounds` of their own for the chosen candidate, which are never those of the search."""
        self._in_time()
        cells = self.split.cells(candidate.method, candidate.seed, "search", (0, 8))
        fingerprint = self._around.fingerprint(next(iter(cells.values())))
        key = {"cell": fingerprint, "new_tokens": self._new_tokens, "rounds": rounds, "threads": torch.get_num_threads()}
        path = self._speeds / f"{candidate.method.name}.{results.content_hash(key)[:12]}.json"
        ratios = _read(path, key)
        if ratios is None:
            ratios = self._time(candidate, rounds)
            facts = environment(torch.device(self._around.device))
            content = {"format": FORMAT, "schema": SCHEMA, "label": candidate.label, "environment": facts, "key": key, "ratios": ratios}
            write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        found = median_interval(ratios)
        if rounds == ROUNDS:
            if candidate not in self.speeds:
                self._said(f"{candidate.label}: {found.value:.2f} times faster ({found.low:.2f} to {found.high:.2f})")
            self.speeds[candidate] = found
        return found

    def floor(self, keep: int) -> Interval | None:
        """Returns how much faster the kept floor is, the whole tower and an LLM that is given `keep` visual tokens; None where none can be cut."""
        try:
            model, prompts = self._load()[0], self._encoded()
            rows = run_cell(model, prompts, [], keep, (self._new_tokens,), ROUNDS)
        except VtrError:
            return None
        return median_interval(_ratios(rows[0], next(row for row in rows if row.kind == KEPT), self._new_tokens))

    def facts(self) -> dict[str, Any]:
        """Returns where, when and with which versions it is measured."""
        around = environment(torch.device(self._around.device))
        named = {name: around[name] for name in ("device", "threads", "date", "versions")}
        return {**named, "dtype": str(self._around.dtype).removeprefix("torch."), "limit": self.split.limit}

    def _score(self, outcomes: Outcomes) -> float:
        return sum(self.split.weights[group] * sum(own.values()) / len(own) for group, own in outcomes.items())

    def _in_time(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def _outcomes(self, candidate: Candidate | None, half: Half, parts: Sequence[tuple[int, int]]) -> Outcomes:
        """Returns the outcomes of slices of samples, run where there is no result yet."""
        found: Outcomes = {}
        for part in parts:
            if (candidate, half, part) not in self._known:
                self._in_time()
                self._known[candidate, half, part] = self._run(candidate, half, part)
            for group, own in self._known[candidate, half, part].items():
                found.setdefault(group, {}).update(own)
        return found

    def _run(self, candidate: Candidate | None, half: Half, part: tuple[int, int]) -> Outcomes:
        method, seed = (candidate.method, candidate.seed) if candidate else (None, None)
        cells = self.split.cells(method, seed, half, part)
        done = run_jobs([Job(self._setup, cell) for cell in cells.values()], self._cells, self._pool, self._listener)
        if done.failures:
            raise (CannotRun if candidate else VtrError)(f"{done.failures[0][1].error}; details in {self._cells}/failed")
        found: Outcomes = {}
        for name, fingerprint in zip(cells, done.fingerprints, strict=True):
            content = results.read_cell(results.cell_path(self._cells, fingerprint))
            self.retained[candidate] = content["summary"]["retained"]
            for family, own in condense(content).families.items():
                found[f"{name}/{family}"] = dict(zip(own.ids, own.values[0].tolist(), strict=True))
        return found

    def _time(self, candidate: Candidate, rounds: int) -> list[float]:
        """Returns the ratios of the full model's time to the candidate's, of every round."""
        model = self._load()[0]
        try:
            rows = run_cell(model, self._encoded(), [candidate.method], 1, (self._new_tokens,), rounds, False, self.until)
        except (TypeError, ValueError, VtrError) as error:
            raise CannotRun(str(error)) from error
        full, own = rows
        ratios = _ratios(full, own, self._new_tokens)
        if len(ratios) < FEWEST_ROUNDS:
            raise OutOfTime
        return ratios

    def _encoded(self) -> list[dict[str, Any]]:
        """Returns prompts of the search samples, one in each batch."""
        if self._prompts is None:
            model, processor = self._load()
            host = host_of(model)
            self._prompts = []
            for sample in self.split.prompts(PROMPTS):
                images, videos = seen_by(host, sample)
                inputs = encode(processor, [sample.question], [images], [videos], host.frame_settings)
                self._prompts.append(dict(to_model(inputs, model)))
        return self._prompts


def median_interval(values: Sequence[float]) -> Interval:
    """Returns the median with the 95 % interval that two of the values are, whatever they are spread like (the sign test's).

    Raises:
        ValueError: fewer values than that needs.
    """
    count = len(values)
    if count < FEWEST_ROUNDS:
        raise WrongValue(f"median_interval: needs at least {FEWEST_ROUNDS} values, got {count}; measure more rounds")
    ordered, off, tail = sorted(values), 0, 0.5**count
    while tail + math.comb(count, off + 1) * 0.5**count <= 0.025:
        off += 1
        tail += math.comb(count, off) * 0.5**count
    return Interval(median(ordered), ordered[off], ordered[-1 - off])


def _ratios(full: Any, row: Any, new_tokens: int) -> list[float]:
    return paired({"runs": full.runs}, {"runs": row.runs}, f"total_ms.{new_tokens}")


def _count(outcomes: Outcomes) -> int:
    return sum(map(len, outcomes.values()))


def _read(path: Path, key: Mapping[str, Any]) -> list[float] | None:
    """Returns the ratios of an earlier run; None where there are none, or the file is not a whole one of this experiment."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = (content["format"], content["schema"], content["key"]) == (FORMAT, SCHEMA, json.loads(json.dumps(key)))
        return [float(ratio) for ratio in content["ratios"]] if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
