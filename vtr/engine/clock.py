"""Measures what choosing tokens costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar

import torch


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
        """Begins a stretch of choosing on `device`; a compiled run has no clock."""
        if torch.compiler.is_compiling():
            return None
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            return event
        return self.now.get()()

    def stop(self, started: Any, device: torch.device) -> None:
        """Ends the stretch begun by `start`."""
        if torch.compiler.is_compiling():
            return
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
