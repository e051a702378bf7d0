"""Interleaved timing of the full model, the methods and the floors: every round runs each of them once on the same prompts."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtr.bench.floors import can_cut, check_floors, encode, next_token, prefill
from vtr.bench.record import FLOOR, KEPT, METHOD
from vtr.bench.schedule import Schedule, Watch, kept_schedule
from vtr.bench.stopwatch import Stopwatch, choosing_in_process_time, peak_bytes
from vtr.engine.llm.entry import swap
from vtr.hosts._protocol import Host, host_of
from vtr.hosts._versions import cache_keyword, output_cache
from vtr.models.devices import synchronize
from vtr.plans import Plan
from vtr.reduction import Reduction, reduced
from vtr.types import Method, VtrError
from vtr.types.naming import FULL


@dataclass
class Row:
    """One line of a cell.

    Args:
        kind: `full`, `kept floor`, `schedule floor` or `method`.
        name: of the method; the kind for the others.
        method: to reduce with, or its plan with steps that were changed.
        schedule: lengths it runs on; given for floors, seen in the warm-up for the others.
        runs: one dict of numbers per counted round, see `_once`.
        peak_bytes: of a prefill, on top of weights and prompts.
        compiled: the same with a compiled decode step, None unless `Asked.compiled`; see `vtr.bench.compiled`.
    """

    kind: str
    name: str
    method: Method | Plan | None = None
    schedule: Schedule | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    compiled: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        method = self.method.methods[0] if isinstance(self.method, Plan) else self.method.resolved() if self.method else None
        settings = {k: v for k, v in asdict(method).items() if v is not None} if method else {}  # type: ignore[call-overload]
        return {
            "kind": self.kind,
            "name": self.name,
            "settings": settings,
            "schedule": asdict(self.schedule) if self.schedule else None,
            "peak_bytes": self.peak_bytes,
            **self.facts,
            "runs": self.runs,
            **({} if self.compiled is None else {"compiled": self.compiled}),
        }


@torch.no_grad()
def run_cell(
    model: Any,
    pool: Sequence[Mapping[str, Tensor]],
    methods: Sequence[Method | Plan],
    keep: int,
    new_tokens: Sequence[int] = (1,),
    repeats: int = 3,
    floors: bool = True,
    until: float = math.inf,
    refused: dict[str, str] | None = None,
    after: Callable[[list[Row]], None] = lambda rows: None,
    advance: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Times one cell: a budget at a batch size.

    Args:
        model: with random or trained weights, on its device.
        pool: prompts, one batch each; rounds take them in turn. Every row of a batch has its one image at the same place.
        methods: with the budget.
        keep: the same budget as a count, for the kept floor.
        new_tokens: answer lengths whose totals are wanted; the prefill makes the first token.
        repeats: counted rounds; one more in front warms up, looks at lengths and measures memory.
        floors: run the floors too.
        until: time of `time.monotonic()` after which no further round begins; one is always counted.
        refused: filled with methods that cannot run on this model and why; None raises their error.
        after: called with all rows after every counted round.
        advance: called with the name of each row after it ran.

    Returns:
        `full`, the kept floor, the methods in their order, and one schedule floor for every schedule that differs and can be cut by hand.
    """
    host = host_of(model)
    rows = [Row(FULL, FULL), *(Row(METHOD, m.methods[0].name if isinstance(m, Plan) else m.name, m) for m in methods)]
    for row in list(rows):
        try:
            _warm_up(host, row, pool[0], new_tokens)
        except (TypeError, ValueError, VtrError) as error:
            if refused is None or row.method is None:
                raise
            refused[row.name] = str(error)
            rows.remove(row)
        advance(row.name)
    if floors:
        check_floors(host)
        full = rows[0].schedule
        assert full is not None
        start, stop = image_span(host, pool[0]["input_ids"])
        kept = kept_schedule(full, pool[0]["input_ids"].shape[1] - (stop - start), keep)
        rows.insert(1, Row(KEPT, KEPT, schedule=kept))
        others = dict.fromkeys(row.schedule for row in rows if row.kind == METHOD and row.schedule is not None and row.schedule != kept)
        rows += [Row(FLOOR, FLOOR, schedule=schedule) for schedule in others if can_cut(host, schedule, full)]
        for row in [row for row in rows if row.kind in (KEPT, FLOOR)]:
            _warm_up(host, row, pool[0], new_tokens)
            advance(row.name)
    for turn in range(repeats):
        first = turn * len(rows) // max(repeats, 1)  # another row begins each round
        for row in rows[first:] + rows[:first]:
            row.runs.append(_once(host, row, pool[(turn + 1) % len(pool)], new_tokens))
            advance(row.name)
        after(rows)
        if time.monotonic() > until:
            break
    return rows


def image_span(host: Host, ids: Tensor) -> tuple[int, int]:
    """Returns the first position of the image and the one behind its last, the same in every row.

    Raises:
        VtrError: rows differ, or have several images.
    """
    visual = torch.stack([ids == p for p in host.placeholder_ids.values()]).any(0)
    start, count = int(visual[0].to(torch.uint8).argmax()), int(visual[0].sum())
    expected = torch.zeros_like(visual)
    expected[:, start : start + count] = True
    if not count or not torch.equal(visual, expected):
        raise VtrError("bench: every prompt of a batch needs one image at the same place; give prompts of one length")
    return start, start + count


def _warm_up(host: Host, row: Row, inputs: Mapping[str, Tensor], new_tokens: Sequence[int]) -> None:
    """Runs a prefill that is not counted, for its lengths and its memory."""
    if inputs["input_ids"].is_cuda:  # kernels are loaded and chosen by the first call
        _once(host, row, inputs, (min(max(new_tokens), 3),))
    watch = Watch(host)
    with ExitStack() as stack:
        reduction = stack.enter_context(reduced(host.model, row.method)) if row.method else None
        if row.schedule is None:
            stack.enter_context(watch)
            work: Callable[[], Any] = partial(host.model, **inputs, logits_to_keep=1)
        else:
            work = _floor_prefill(host, row.schedule, inputs)
        row.peak_bytes = peak_bytes(work, host.model)
        if reduction is not None:
            report = reduction.report()
            row.schedule = watch.schedule(report.sequence_lengths, reduction.plan.frozen)
            row.facts = {"average_keep": report.average_keep, "retained": [len(image.retained) for image in report.images]}
        elif row.schedule is None:
            row.schedule = watch.schedule()


def _floor_prefill(
    host: Host, schedule: Schedule, inputs: Mapping[str, Tensor], watch: Stopwatch | None = None, static: Any = None
) -> Callable[[], Any]:
    """Returns a prefill cut by hand, ready to run; pixel values are made small here, outside of it."""
    span = image_span(host, inputs["input_ids"])
    if schedule.grid:
        size, pixels = [side * host.tower.patch_size for side in schedule.grid], inputs["pixel_values"]
        pixels = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
        inputs = {**inputs, "pixel_values": torch.nn.functional.interpolate(pixels.float(), size=size).to(pixels.dtype)}

    def run() -> tuple[Tensor, Any]:
        encoded = encode(host, schedule, inputs)
        if watch is not None:
            watch.mark("encoded")
        return prefill(host, schedule, inputs, encoded, span, static)

    return run


def _once(host: Host, row: Row, inputs: Mapping[str, Tensor], new_tokens: Sequence[int]) -> dict[str, Any]:
    """Makes one answer with a reduction that is applied for it; `apply_ms` is how long that took."""
    apart = Stopwatch(torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(choosing_in_process_time())
        apart.mark("start")
        reduction = stack.enter_context(reduced(host.model, row.method)) if row.method else None
        apart.mark("applied")
        found = answer(host, row, inputs, new_tokens, reduction)
    return {**found, "apply_ms": apart.ms("start", "applied") if row.method else 0.0}


def answer(
    host: Host,
    row: Row,
    inputs: Mapping[str, Tensor],
    new_tokens: Sequence[int],
    reduction: Reduction | None,
    static: Any = None,
    step: Callable[..., Tensor] = next_token,
) -> dict[str, Any]:
    """Makes one answer of a model that is reduced as the row says, and returns the milliseconds of its parts.

    Args:
        host: the model.
        row: what runs.
        inputs: a prompt from the pool.
        new_tokens: answer lengths whose totals are wanted.
        reduction: of the row, installed.
        static: an empty static cache to use; None lets the cache grow.
        step: `floors.next_token`, or that compiled.

    Returns:
        `tower_ms` (projector and removals in the tower included), `choosing_ms`, `prefill_ms` (all up to the first token, tower and choosing
        included), `decode_ms` per further token, `total_ms` by answer length, and `kv_bytes` after the prefill.
    """
    model, ids = host.model, inputs["input_ids"]
    device, floor, longest = ids.device, row.kind in (KEPT, FLOOR), max(new_tokens)
    watch = Stopwatch(model)
    found: dict[str, Any] = {"tower_ms": 0.0, "choosing_ms": 0.0}
    with ExitStack() as stack:
        if floor:
            assert row.schedule is not None
            run, length = _floor_prefill(host, row.schedule, inputs, watch, static), row.schedule.llm[0]
        else:
            stack.callback(_timed_encode(host, watch))
            given = {} if static is None else {cache_keyword(): static}
            run, length = partial(model, **inputs, **given, logits_to_keep=1), ids.shape[1]
        masks = _masks(ids, length, longest, static)
        synchronize(model)
        watch.mark("start")
        output = run()
        logits, cache = output if floor else (output.logits, output_cache(output))
        token = logits[:, -1:].argmax(-1)
        watch.mark("1")
        found["kv_bytes"] = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        for number in range(1, longest):
            position = torch.full((len(ids), 1), ids.shape[1] + number - 1, device=device)
            token = step(model, cache, token, position, masks(number))[:, -1:].argmax(-1)
            if number + 1 in new_tokens:
                watch.mark(str(number + 1))
        synchronize(model)
        if reduction is not None:
            found["choosing_ms"] = reduction.report().choosing_ms
    found["tower_ms"] = watch.ms("start" if floor else "tower", "encoded")
    found["prefill_ms"] = watch.ms("start", "1")
    found["total_ms"] = {str(n): watch.ms("start", str(n)) for n in new_tokens}
    if longest > 1:
        found["decode_ms"] = watch.ms("1", str(longest)) / (longest - 1)
    del output, cache
    gc.collect()
    return found


def _masks(ids: Tensor, length: int, longest: int, static: Any) -> Callable[[int], Tensor]:
    """Returns the attention mask of every decode step: of all tokens so far, or for a static cache of one shape, `(B, 1, 1, columns)` bool."""
    if static is None:
        given = ids.new_ones(len(ids), length + longest)
        return lambda step: given[:, : length + step]
    columns = torch.arange(static.get_max_length(0), device=ids.device).expand(len(ids), 1, 1, -1)
    return lambda step: columns < length + step


def _timed_encode(host: Host, watch: Stopwatch) -> Callable[[], None]:
    """Marks `tower` and `encoded` around the base model's image encoding; returns what undoes it."""
    name = host.encode["image"]
    original = getattr(host.base, name)

    def encode(*args: Any, **kwargs: Any) -> Any:
        watch.mark("tower")
        output = original(*args, **kwargs)
        watch.mark("encoded")
        return output

    return swap(host.base, name, encode)
