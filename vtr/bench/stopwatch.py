"""Times and memory: CUDA events and the allocator's peak on a GPU; process time and profiled allocations on a CPU.

Process time does not count what other programs do meanwhile; with one thread it is what an idle machine would take.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vtr.engine.clock import Clock
from vtr.models.devices import cuda_devices, synchronize


class Stopwatch:
    """Marks along one run, read after all of it.

    Args:
        place: the device that works, or the model, whose devices are all waited for.
    """

    def __init__(self, place: Any) -> None:
        devices = cuda_devices(place)
        self.device, self._others = (devices[0], devices[1:]) if devices else (torch.device("cpu"), [])
        self._marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        """Notes that the work queued so far, on all devices, ends here."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for other in self._others:
                stream.wait_stream(torch.cuda.current_stream(other))
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream)
            self._marks[name] = event
        else:
            self._marks[name] = time.process_time()

    def ms(self, first: str, second: str) -> float:
        """Returns the milliseconds between two marks; call `vtr.models.devices.synchronize` first."""
        begin, end = self._marks[first], self._marks[second]
        return begin.elapsed_time(end) if self.device.type == "cuda" else (end - begin) * 1e3


def clock_name(device: torch.device) -> str:
    """Returns what `Stopwatch` reads, in words."""
    return "CUDA events" if device.type == "cuda" else "process time, all threads"


@contextmanager
def choosing_in_process_time() -> Iterator[None]:
    """Reports read wall time on the CPU; inside the block they read process time, like everything else here."""
    token = Clock.now.set(time.process_time)
    try:
        yield
    finally:
        Clock.now.reset(token)


def peak_bytes(run: Callable[[], Any], place: Any) -> int:
    """Returns the most bytes allocated at once during `run`, on top of what was there before, over all devices of `place`, a device or a model."""
    devices = cuda_devices(place)
    if devices:
        synchronize(place)
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        before = [torch.cuda.memory_allocated(device) for device in devices]
        run()
        synchronize(place)
        return sum(torch.cuda.max_memory_allocated(device) - was for device, was in zip(devices, before, strict=True))
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events: list[tuple[int, int]] = []
    waiting = list(seen.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most


@contextmanager
def _silent() -> Iterator[None]:
    """Sends the stderr of the process nowhere: the profiler announces every start and stop there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
