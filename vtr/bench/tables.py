"""Numbers of a record as tables of text: medians with their spread, and ratios to the full model and both floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from vtr.bench.record import FLOOR, KEPT, METHOD
from vtr.types.naming import FULL

Cell = Mapping[str, Any]
Line = Mapping[str, Any]
MIB = 2**20


def runs_of(row: Line, name: str) -> list[float]:
    """Returns one number of every counted round; `total_ms.64` reads a total."""
    name, _, key = name.partition(".")
    return [run[name][key] if key else run[name] for run in row["runs"] if name in run]


def spread(values: Sequence[float]) -> str:
    """Returns `12.3 ± 0.4`: the median and the largest distance of a round from it; `12.3` of a single round."""
    middle = median(values)
    off = max(abs(value - middle) for value in values)
    digits = 0 if middle >= 1000 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ± {off:.{digits}f}" if len(values) > 1 else f"{middle:.{digits}f}"


def row_of(cell: Cell, kind: str) -> Line | None:
    """Returns the first row of a kind."""
    return next((row for row in cell["rows"] if row["kind"] == kind), None)


def floor_of(cell: Cell, row: Line) -> Line | None:
    """Returns the floor with the row's own lengths; the kept floor where they are the same."""
    return next((f for f in cell["rows"] if f["kind"] in (KEPT, FLOOR) and f["schedule"] == row["schedule"]), None)


def paired(row: Line, other: Line, name: str, change: Callable[[int, float], float] = lambda i, value: value) -> list[float]:
    """Ratios of two rows round by round; `change(round, value)` corrects the first."""
    return [change(i, a) / b for i, (a, b) in enumerate(zip(runs_of(row, name), runs_of(other, name), strict=True))]


def compiled_cell(cell: Cell) -> Cell | None:
    """Returns the cell as it is with a compiled decode step; rows that could not be compiled are not in it, None where the full model is not."""
    rows = [{**row, "runs": row["compiled"]["runs"]} for row in cell["rows"] if "runs" in row.get("compiled", {})]
    found = {**cell, "rows": [{name: value for name, value in row.items() if name != "peak_bytes"} for row in rows]}
    return found if row_of(found, FULL) is not None else None


def not_compiled(cell: Cell) -> dict[str, str]:
    """Returns the rows that were to be compiled and were not, with the reason."""
    return {row["name"]: row["compiled"]["not_run"] for row in cell["rows"] if "not_run" in row.get("compiled", {})}


def heads(cell: Cell) -> list[str]:
    """Columns of a cell's table."""
    longest = _longest(cell)
    answer = [f"{longest} tokens ms", "ms per token", "tokens/s"] if longest != "1" else ["tokens/s"]
    last = ["faster than full", "of schedule floor", "of kept floor"] if row_of(cell, KEPT) else ["faster than full"]
    peak = ["peak MiB"] if "peak_bytes" in cell["rows"][0] else []
    return ["", "average tokens", "tower ms", "choosing ms", "prefill ms", *answer, *peak, "KV MiB", *last]


def lines(cell: Cell) -> list[list[str]]:
    """Returns the rows of a cell's table: full, kept floor, then the methods by prefill time."""
    fixed = [row for row in cell["rows"] if row["kind"] in (FULL, KEPT)]
    methods = [row for row in cell["rows"] if row["kind"] == METHOD]
    return [_line(cell, row) for row in [*fixed, *sorted(methods, key=lambda row: median(runs_of(row, "prefill_ms")))]]


def _line(cell: Cell, row: Line) -> list[str]:
    full, kept, floor = row_of(cell, FULL), row_of(cell, KEPT), floor_of(cell, row)
    assert full is not None
    longest = _longest(cell)
    total = median(runs_of(row, f"total_ms.{longest}"))
    found = [row["name"], f"{row['average_keep']:.1f}" if "average_keep" in row else "", spread(runs_of(row, "tower_ms"))]
    found.append(spread(runs_of(row, "choosing_ms")) if row["kind"] == METHOD else "")
    found.append(spread(runs_of(row, "prefill_ms")))
    if longest != "1":
        found += [spread(runs_of(row, f"total_ms.{longest}")), spread(runs_of(row, "decode_ms"))]
    found.append(f"{1e3 * cell['batch'] * int(longest) / total:.1f}")
    found += [f"{row['peak_bytes'] / MIB:.0f}"] if "peak_bytes" in row else []
    found.append(f"{median(runs_of(row, 'kv_bytes')) / MIB:.1f}")
    found.append("" if row is full else _times(full, row, longest))
    if kept is not None:
        found.append("" if floor is None or row["kind"] != METHOD else _times(row, floor, longest))
        found.append("" if row["kind"] != METHOD else _times(row, kept, longest))
    return found


def _times(slow: Line, fast: Line, longest: str) -> str:
    """Returns the ratio of prefill, and of the longest answer's total behind a slash."""
    first = f"{median(paired(slow, fast, 'prefill_ms')):.2f}"
    return first if longest == "1" else f"{first} / {median(paired(slow, fast, f'total_ms.{longest}')):.2f}"


def _longest(cell: Cell) -> str:
    return max(cell["rows"][0]["runs"][0]["total_ms"], key=int)


def ops_table(rows: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and lines of an ops record: one line per op, one column per size; and what was left out."""
    sizes = list(dict.fromkeys((row["tokens"], row["batch"]) for row in rows))
    found: dict[str, dict[tuple[int, int], str]] = {}
    for row in rows:
        text = f"({row['left_out']})" if "left_out" in row else spread(row["ms"])
        found.setdefault(row["op"], {})[row["tokens"], row["batch"]] = text
    return ["ms", *(f"N = {n}, B = {b}" for n, b in sizes)], [[op, *(own.get(size, "") for size in sizes)] for op, own in found.items()]


def selections_table(rows: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and lines of methods' selections beside plain references, one line per method and size; a ratio above 1 is faster."""
    head = ["method", "N", "B", "reference ms", "vtr ms", "ratio", "launches", "peak MiB", "full map MiB"]
    found = []
    for row in rows:
        size = [row["method"], str(row["tokens"]), str(row["batch"])]
        if "left_out" in row:
            found.append([*size, f"({row['left_out']})", "", "", "", "", ""])
            continue
        ratio = median(slow / fast for slow, fast in zip(row["plain_ms"], row["ms"], strict=True))
        waits = f" + {row['plain_waits']} waits" if row["plain_waits"] else ""
        launches = f"{row['plain_launches']}{waits} / {row['launches']}"
        peaks = f"{row['plain_peak_bytes'] / MIB:.1f} / {row['peak_bytes'] / MIB:.1f}"
        whole = f"{row['map_bytes'] / MIB:.0f}" if row["map_bytes"] else ""
        found.append([*size, spread(row["plain_ms"]), spread(row["ms"]), f"{ratio:.2f}", launches, peaks, whole])
    return head, found
