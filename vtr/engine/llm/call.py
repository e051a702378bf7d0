"""What is remembered during one forward, and what travels with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.engine.images import Images
from vtr.engine.llm.positions import Positions
from vtr.engine.signals import Tap
from vtr.engine.tokens import Sequence


@dataclass
class Encoded:
    """What the tower leaves for the LLM; rides on the output of `get_image_features`.

    Args:
        images: the images in the order they were encoded.
        kept: `(images * slots,)` bool, patches that are still there; None when nothing was removed.
        counts: visual tokens left of each image.
        taps: tower taps that steps of later stages read.
        rows: `(images, V)` tower row of each view.
        clock: time spent choosing so far.
        checks: counts of the steps so far, as in `Call`.
    """

    images: Images
    kept: Tensor | None
    counts: list[int]
    taps: dict[int, Tap]
    rows: Tensor
    clock: Clock
    checks: list[tuple[Any, Tensor, list[int]]]


@dataclass
class CacheState:
    """Travels with one KV cache: which columns of each layer are real, and how positions were moved.

    Args:
        valid: per layer `(B, keys)` bool; layers between two removals share the tensor. For compileable caches the full cache size with the
            future True (causality hides it), so that decoding never changes a shape.
        segment: per layer a number, the same for layers that see the same keys.
        shift: per layer None or `(B, 1)` int64, how far positions were moved down by renumbering.
        where: per layer `(B, K)` int64, the logical column (counted as if nothing had been removed) of the first K keys, -1 for filler; keys
            behind them continue at `logical`. Layers between two removals share the tensor.
        logical: logical length where `where` ends.
        dropped: logical minus physical length of layer 0; constant while decoding and when the cache is cropped.
        static: the cache is compileable.
    """

    valid: list[Tensor] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    shift: list[Tensor | None] = field(default_factory=list)
    where: list[Tensor] = field(default_factory=list)
    logical: int = 0
    dropped: int = 0
    static: bool = False

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Repeats, selects or reorders prompt rows as the cache does: `change` maps a tensor with rows first to the new one."""
        known: dict[int, Any] = {id(None): None}
        lists: tuple[list[Any], ...] = (self.valid, self.shift, self.where)
        for tensors in lists:
            for i, tensor in enumerate(tensors):
                if id(tensor) not in known:
                    known[id(tensor)] = change(tensor)
                tensors[i] = known[id(tensor)]


@dataclass
class Call:
    """One forward of the LLM.

    Args:
        visual: `(B, q)` bool, placeholders of this call; None when no ids came in.
        encoded: what the tower left.
        ids: `(B, q)` token ids of this call, where a step asks for the question as text.
        questions: question of every row, once asked for.
        prefill: this call has visual tokens and the plan acts on them.
        reduced: anything is shorter or masked by us, in this call or earlier in this cache.
        static: the cache is compileable and holds a reduction already.
        incoming: tokens of this call before any removal.
        cache: its KV cache, or None.
        images, sequence, positions: tokens that are left.
        text: `(B, q)` bool over original columns, real tokens that are not visual; `instruction`: those after the first visual token.
        text_width: most text tokens of a row.
        line_of: `(B, q)` int64 over original columns, `image * lines + line` of a newline token, -1 otherwise.
        fixed: per row, tokens that are never removed (text and trailing padding).
        newlines: newline tokens left of each image; counts: visual tokens left of each image.
        past, now: per layer, real columns of the cache and of this call; `segment` numbers what layers share.
        now_where: per layer `(B, S)` int64, original column in this call of every token there, -1 for filler; None = all columns in order.
        before: tokens in front of this call, those that were removed included.
        state: what an earlier reduced call left in this cache.
        windowed: the prompt is longer than the window of sliding-window layers, whose masks are then made from logical columns.
        read: `(B, q)` bool, tokens that a method may read: the prompt, without guesses of a draft behind it and without labelled answers.
        prompt: columns of this call that belong to the prompt, where `generate` says so; `answers (B, q)` bool, labelled columns.
        checks: `(step, tokens kept per View row, tokens asked for)`, compared when a report is made.
        outer: the call that this one interrupts, when a hook runs the model in the middle of a call.
        alone: the language model was called without its base model.
        taps: what was read at layers of the LLM.
        events: `(layer, counts)` after every removal; the boundary is layer 0.
        unpadded: no row has padding.
        probing: a projection of our own is running; taps look away.
        expand: how often prompt rows repeat (beams).
    """

    visual: Tensor | None = None
    encoded: Encoded | None = None
    ids: Tensor | None = None
    questions: list[str] | None = None
    prefill: bool = False
    reduced: bool = False
    static: bool = False
    incoming: int = 0
    cache: Any = None
    images: Images | None = None
    sequence: Sequence | None = None
    positions: Positions | None = None
    text: Tensor | None = None
    instruction: Tensor | None = None
    read: Tensor | None = None
    prompt: int | None = None
    answers: Tensor | None = None
    text_width: int = 0
    line_of: Tensor | None = None
    lines: int = 1
    fixed: list[int] = field(default_factory=list)
    newlines: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    past: list[Tensor | None] = field(default_factory=list)
    now: list[Tensor] = field(default_factory=list)
    now_where: list[Tensor | None] = field(default_factory=list)
    before: int = 0
    state: CacheState | None = None
    windowed: bool = False
    segment: list[int] = field(default_factory=list)
    masks: dict[tuple, Any] = field(default_factory=dict)
    taps: dict[int, Tap] = field(default_factory=dict)
    frozen: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    events: list[tuple[int, list[int]]] = field(default_factory=list)
    clock: Clock = field(default_factory=lambda: Clock())
    unpadded: bool = False
    probing: bool = False
    expand: int = 1
    checks: list[tuple[Any, Tensor, list[int]]] = field(default_factory=list)
    outer: Call | None = None
    alone: bool = False


class Clock:
    """Milliseconds spent choosing, by CUDA events on a GPU and `now` on a CPU; read after the work is done.

    Attributes:
        now: gives seconds; wall time, unless a caller sets another function in its own context.
    """

    now: ClassVar[ContextVar[Callable[[], float]]] = ContextVar("vtr_clock", default=time.perf_counter)

    def __init__(self) -> None:
        self._host_ms = 0.0
        self._events: list[tuple[Any, Any]] = []

    def start(self, device: torch.device) -> Any:
        """Begins a stretch of choosing on `device`."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            return event
        return self.now.get()()

    def stop(self, started: Any, device: torch.device) -> None:
        """Ends the stretch begun by `start`."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            self._events.append((started, event))
        else:
            self._host_ms += (self.now.get()() - started) * 1e3

    def total_ms(self) -> float:
        """Everything so far; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._host_ms + sum(first.elapsed_time(second) for first, second in self._events)

    def extend(self, other: Clock) -> None:
        """Adds another clock's stretches."""
        self._host_ms += other._host_ms
        self._events += other._events


def move(call: Call, device: torch.device) -> None:
    """Follows a model that is split over devices: everything a call knows goes to `device`."""
    sequence, images = call.sequence, call.images
    if sequence is None or images is None or sequence.column.device == device:
        return
    for owner in (sequence, images, call.positions, call):
        for name, value in vars(owner).items():
            if isinstance(value, Tensor):
                setattr(owner, name, value.to(device))
    images.tables = {key: table.to(device) for key, table in images.tables.items()}
    for notes in images.memory.values():
        notes.update({key: value.to(device) for key, value in notes.items() if isinstance(value, Tensor)})
