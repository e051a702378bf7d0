"""What is asked of every method's speed, checked against measured rounds."""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple

from vtr.bench.record import KEPT, METHOD
from vtr.bench.tables import Cell, Line, floor_of, paired, row_of, runs_of
from vtr.registry import method_class
from vtr.types.naming import FULL

PREFILL_OVER, CHOOSING_GPU, CHOOSING_CPU, DECODE_OVER, MEMORY_OVER = 0.05, 0.03, 0.05, 0.02, 0.01


class Verdict(NamedTuple):
    """One target of one method in one cell: what was found, whether it is met, and where a miss comes from."""

    method: str
    target: str
    found: str
    met: bool
    reason: str = ""


def verdicts(cell: Cell, environment: dict[str, Any], weights: int) -> list[Verdict]:
    """Checks all targets of the methods of a cell that has floors.

    Args:
        cell: of a record.
        environment: of the record.
        weights: bytes of the model's weights.
    """
    full = row_of(cell, FULL)
    assert full is not None
    found = []
    for row in [row for row in cell["rows"] if row["kind"] == METHOD]:
        floor = floor_of(cell, row)
        if floor is not None:
            found.append(_prefill(row, floor))
            if environment["kind"] == "cuda" and cell["batch"] == 8 and runs_of(row, "decode_ms"):
                found.append(_decode(row, floor))
        found.append(_choosing(row, full, CHOOSING_GPU if environment["kind"] == "cuda" else CHOOSING_CPU))
        found.append(_memory(row, full, weights))
    return found


def _prefill(row: Line, floor: Line) -> Verdict:
    choosing, bare = runs_of(row, "choosing_ms"), runs_of(floor, "prefill_ms")
    over = [ratio - 1 for ratio in paired(row, floor, "prefill_ms", lambda i, ms: ms - choosing[i])]
    off = median(over)
    reason = ""
    if off > PREFILL_OVER:
        tower = [a - b for a, b in zip(runs_of(row, "tower_ms"), runs_of(floor, "tower_ms"), strict=True)]
        rest = [o * b for o, b in zip(over, bare, strict=True)]
        reason = f"{median(rest):.1f} ms more; the tower alone, choosing inside it included, takes {median(tower):+.1f} ms"
        if min(over) <= PREFILL_OVER:
            reason += "; not in every round, the best is within the target"
    return Verdict(row["name"], "prefill", f"{100 * off:+.1f} %", off <= PREFILL_OVER, reason)


def _choosing(row: Line, full: Line, limit: float) -> Verdict:
    share = median(paired({"runs": [{"ms": run["choosing_ms"]} for run in row["runs"]]}, _as("prefill_ms", full), "ms"))
    reason = method_class(row["name"]).card.cost or "not said on its card"
    return Verdict(row["name"], "choosing", f"{100 * share:.1f} %", share <= limit, "" if share <= limit else f"cost: {reason}")


def _as(name: str, row: Line) -> Line:
    return {"runs": [{"ms": run[name]} for run in row["runs"]]}


def _decode(row: Line, floor: Line) -> Verdict:
    off = median(paired(row, floor, "decode_ms")) - 1
    extra = median([a - b for a, b in zip(runs_of(row, "decode_ms"), runs_of(floor, "decode_ms"), strict=True)])
    met = off <= DECODE_OVER
    return Verdict(row["name"], "decode", f"{100 * off:+.1f} %", met, "" if met else f"{extra:.2f} ms per token more, hooks of every layer")


def _memory(row: Line, full: Line, weights: int) -> Verdict:
    off = (weights + row["peak_bytes"]) / (weights + full["peak_bytes"]) - 1
    met = off <= MEMORY_OVER
    more = (row["peak_bytes"] - full["peak_bytes"]) / 2**20
    return Verdict(row["name"], "memory", f"{100 * off:+.1f} %", met, "" if met else f"{more:.0f} MiB more while it chooses")


def tower_against_boundary(cell: Cell) -> list[tuple[str, float]]:
    """Returns the prefill of methods that shorten the tower, as a share of the kept floor's: the boundary form of the budget at no cost."""
    kept = row_of(cell, KEPT)
    if kept is None:
        return []
    acting = [row for row in cell["rows"] if row["kind"] == METHOD and row["schedule"]["tower"] != kept["schedule"]["tower"]]
    return [(row["name"], median(paired(row, kept, "prefill_ms"))) for row in acting]
