"""Methods' selections against plain references on the same tensors: time, launches and memory, in one run and by turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vtr.bench.cases import CASES, ONLY_CROPS, Case, Given
from vtr.bench.launches import launches
from vtr.bench.shapes import GIB, free_gib
from vtr.bench.stopwatch import Stopwatch, peak_bytes
from vtr.models.devices import synchronize
from vtr.ops.blocks import all_at_once
from vtr.types.errors import WrongValue

SIZES = {576: (1, 64), 2880: (5, 160)}
"""Tokens of an image -> its views of 24 x 24 tokens, and how many tokens are left."""
BATCHES, LEAST_MS = (1, 8), 30.0
"""Images at a time; how long one side works before the other has its turn."""


@torch.no_grad()
def time_selections(
    device: str,
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
    methods: Iterable[str] | None = None,
    tokens: Iterable[int] = tuple(SIZES),
    batches: Iterable[int] = BATCHES,
    advance: Callable[[str], None] = lambda what: None,
    longest_s: float = math.inf,
) -> list[dict[str, Any]]:
    """Times the selection of every method that has a plain reference, and that reference, in turns: reference, vtr, vtr, reference, ...

    Args:
        device, dtype: of the tokens, which are 1024 wide.
        repeats: rounds that count.
        methods: names; None = all with a reference.
        tokens: of an image, 576 or 2880.
        batches: images at a time; the reference takes them one by one.
        advance: called after each method and size.
        longest_s: a size is left out where its reference needs more seconds; larger ones of that method are not tried.

    Returns:
        Dicts with `method`, `tokens`, `batch`, `keep` and either `left_out`, or `plain_ms` and `ms` (one number per round), `plain_launches`,
        `launches`, `plain_waits`, `waits`, `plain_peak_bytes`, `peak_bytes`, and `map_bytes` of the attention map that the authors' way reads.

    Raises:
        ValueError: a method without a reference, or another number of tokens.
    """
    names = list(CASES) if methods is None else list(methods)
    for name in names:
        if name not in CASES:
            raise WrongValue(f"bench: no plain reference for {name!r}; there is one for {', '.join(CASES)}")
    sizes = [(count, batch) for count in tokens for batch in batches]
    for count, _ in sizes:
        if count not in SIZES:
            raise WrongValue(f"bench: selections are timed with {' or '.join(map(str, SIZES))} tokens of an image, got {count}")
    found = []
    for name in names:
        too_long = ""
        for count, batch in sizes:
            views, keep = SIZES[count]
            if name in ONLY_CROPS and views == 1:
                continue
            entry: dict[str, Any] = {"method": name, "tokens": count, "batch": batch, "keep": keep}
            needed, free = batch * (3 * count**2 + 16 * count * 1024) * 4 / GIB, free_gib(device)
            if needed > free or too_long:
                entry["left_out"] = too_long or f"needs about {needed:.0f} GiB, {free:.0f} are free"
            else:
                case, place = CASES[name](Given(views, batch, keep, device=device, dtype=dtype)), torch.device(device)
                seconds = _ms(case.run_plain, 1, place) / 1e3 if longest_s < math.inf else 0.0
                if seconds > longest_s:
                    entry["left_out"] = too_long = f"more than {longest_s:g} s for the reference"
                else:
                    entry |= measure(case, place, repeats)
            found.append(entry)
            advance(name)
    return found


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Returns times by turns, launches and waits (as on a GPU, all rows at once), and peak memory of both sides of a case."""
    sides: dict[str, Callable[[], Any]] = {"plain_": case.run_plain, "": case.ours}
    found: dict[str, Any] = {"map_bytes": case.map_bytes}
    for side, run in sides.items():
        run()  # warms up
        with all_at_once():
            found[f"{side}launches"], found[f"{side}waits"] = launches(run)
        found[f"{side}peak_bytes"] = peak_bytes(run, device)
    inner = {side: max(1, round(LEAST_MS / max(_ms(run, 1, device), 1e-3))) for side, run in sides.items()}
    for side in sides:
        found[f"{side}ms"] = []
    for turn in range(repeats):
        for side in sides if turn % 2 == 0 else reversed(sides):
            found[f"{side}ms"].append(_ms(sides[side], inner[side], device))
    return found


def _ms(run: Callable[[], Any], times: int, device: torch.device) -> float:
    watch = Stopwatch(device)
    synchronize(device)
    watch.mark("start")
    for _ in range(times):
        run()
    watch.mark("stop")
    synchronize(device)
    return watch.ms("start", "stop") / times
