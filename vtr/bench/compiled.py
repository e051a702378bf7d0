"""Answers whose decode step is compiled on a static cache: one graph (`fullgraph=True`) per row, made in a warm-up that is not counted.

A compiled step belongs to one installed reduction, so a row keeps its reduction for all of its rounds, and rows follow one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from vtr.bench.floors import next_token
from vtr.bench.measure import Row, answer
from vtr.bench.stopwatch import choosing_in_process_time
from vtr.hosts._protocol import Host, host_of
from vtr.models.devices import synchronize
from vtr.reduction import reduced
from vtr.types import VtrError

OVER = "the time given was over"


@torch.no_grad()
def run_compiled(
    model: Any,
    rows: Sequence[Row],
    pool: Sequence[Mapping[str, Tensor]],
    new_tokens: Sequence[int],
    repeats: int,
    until: float = float("inf"),
    after: Callable[[list[Row]], None] = lambda rows: None,
    advance: Callable[[str], None] = lambda what: None,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Fills `row.compiled` of every row, with numbers or with the reason why there are none.

    Args:
        model: without a reduction.
        rows: from `measure.run_cell`, whose schedules say how long a row's cache has to be.
        pool, new_tokens, repeats: as there.
        until: time of `time.monotonic()` after which no further row begins; rows that began count all of their rounds.
        after, advance: as there, after every row.
        backend: of `torch.compile`.

    Raises:
        VtrError: the LLM does not run with SDPA.
    """
    host = host_of(model)
    if host.attention_name(tower=False) != "sdpa":
        raise VtrError("bench: the compiled decode step is timed with --attention sdpa only; leave --compiled out")
    for row in rows:
        if time.monotonic() > until:
            row.compiled = {"not_run": OVER}
        else:
            try:
                row.compiled = _row(host, row, pool, new_tokens, repeats, backend)
            except (RuntimeError, TypeError, ValueError) as error:  # whatever the compiler says about this row
                row.compiled = {"not_run": _said(error)}
            finally:
                torch._dynamo.reset()
        advance(f"{row.name}, compiled")
        after(list(rows))


def _row(
    host: Host, row: Row, pool: Sequence[Mapping[str, Tensor]], new_tokens: Sequence[int], repeats: int, backend: str | Callable[..., Any]
) -> dict[str, Any]:
    """Returns `length` of the cache in tokens, `warm_up_s` with the compiler in it, `graphs` that it made, and the counted `runs`."""
    from torch._dynamo.utils import counters
    from transformers import StaticCache

    assert row.schedule is not None
    length = max(row.schedule.llm) + max(new_tokens)
    config = host.model.config.get_text_config()
    step = torch.compile(_step, backend=backend, fullgraph=True, dynamic=False)
    counters.clear()
    with ExitStack() as stack:
        stack.enter_context(choosing_in_process_time())
        reduction = stack.enter_context(reduced(host.model, row.method)) if row.method else None

        def once(inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> dict[str, Any]:
            return answer(host, row, inputs, lengths, reduction, StaticCache(config=config, max_cache_len=length), step)

        started = time.monotonic()
        for _ in range(2):  # the second lets the compiler's threads come to rest, which process time would count
            once(pool[0], (min(max(new_tokens), 3),))
        synchronize(host.model)
        warm_up = time.monotonic() - started
        runs = [once(pool[(turn + 1) % len(pool)], new_tokens) for turn in range(repeats)]
    return {"length": length, "warm_up_s": round(warm_up, 1), "graphs": counters["stats"]["unique_graphs"], "runs": runs}


def _step(model: Any, *given: Any) -> Tensor:
    """Returns `next_token` of the model's forward: hooks on the outermost module read `labels=` only, and stop the compiler."""
    return next_token(model.forward, *given)


def _said(error: Exception) -> str:
    """Returns the first two lines of an error of the compiler, which say what it is."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    return f"{type(error).__name__}: {' '.join(said)[:300]}"
