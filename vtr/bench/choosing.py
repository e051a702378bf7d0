"""What choosing costs: time for signals and selection as a share of the full model's prefill, both measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from vtr.apply import reduced


class Cost(NamedTuple):
    """One method at one budget: medians of prefill and choosing in ms, and choosing in percent of the full model's prefill."""

    method: str
    keep: int | None
    prefill_ms: float
    choosing_ms: float
    share: float


@torch.no_grad()
def measure(
    model: Any,
    inputs: dict[str, Any],
    methods: Iterable[tuple[str, dict[str, Any]]],
    repeats: int = 3,
    advance: Callable[[], None] = lambda: None,
) -> tuple[float, list[Cost]]:
    """Times the full model and every method in turn, `repeats` times over.

    Args:
        model, inputs: from `vtr.bench.shapes.build`, or any model with a host.
        methods: `(name, settings)`.
        repeats: rounds; the first is warm-up and not counted when there are more.
        advance: called after every prefill.

    Returns:
        Median prefill of the full model in ms, and the costs in the order of `methods`. On the CPU prefill is process time; choosing is wall
        time, an upper bound on a busy machine.
    """
    methods = list(methods)
    full: list[float] = []
    found: list[list[tuple[float, float]]] = [[] for _ in methods]
    for _ in range(repeats):
        full.append(_prefill(model, inputs))
        advance()
        for own, (name, settings) in zip(found, methods, strict=True):
            with reduced(model, name, **settings) as reduction:
                took = _prefill(model, inputs)
                own.append((took, reduction.report().choosing_ms))
            advance()
    counted = slice(1, None) if repeats > 1 else slice(None)
    base = statistics.median(full[counted])
    costs = []
    for (name, settings), own in zip(methods, found, strict=True):
        prefill, choosing = (statistics.median(column) for column in zip(*own[counted], strict=True))
        costs.append(Cost(name, settings.get("keep"), prefill, choosing, 100 * choosing / base))
    return base, costs


def _prefill(model: Any, inputs: dict[str, Any]) -> float:
    """Milliseconds of one prefill: process time on the CPU, wall time between synchronisations on CUDA."""
    cuda = inputs["input_ids"].is_cuda
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    started = clock()
    model(**inputs, logits_to_keep=1)
    if cuda:
        torch.cuda.synchronize()
    return (clock() - started) * 1e3


def markdown(shape: str, tokens: int, base: float, costs: Sequence[Cost]) -> str:
    """A table of costs, dearest first."""
    lines = [
        f"`{shape}`, {tokens} visual tokens, full prefill {base:.0f} ms:",
        "",
        "| method | keep | choosing ms | percent of full prefill | prefill ms |",
        "|---|---|---|---|---|",
    ]
    for cost in sorted(costs, key=lambda c: -c.share):
        keep = "" if cost.keep is None else str(cost.keep)
        lines.append(f"| {cost.method} | {keep} | {cost.choosing_ms:.2f} | {cost.share:.2f} | {cost.prefill_ms:.0f} |")
    return "\n".join(lines)
