"""Markdown from result files: a table per model, task and budget, every row against `random` at the same budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtr.eval.cells import FULL
from vtr.eval.stats import paired_difference
from vtr.eval.summary import Row, make_rows, percent

BASELINES = (FULL, "random", "uniform", "pool", "resize", "none")
"""Rows without which a comparison means little."""


def markdown(cells: Sequence[Mapping[str, Any]], times: Sequence[Mapping[str, Any]] = ()) -> str:
    """Tables of all models and tasks among the cells.

    Args:
        cells: contents of result files, for scores.
        times: contents of result files of the same experiments that ran the tower in every cell, for milliseconds; none = no such column.
    """
    parts = []
    keys = dict.fromkeys((c["fingerprint"]["model"]["name"], c["fingerprint"]["task"]["name"]) for c in cells)
    for model, task in keys:
        own = make_rows(_of(cells, model, task))
        timed = {(row.method, row.budget): row.means["latency_ms"] for row in make_rows(_of(times, model, task))}
        parts.append(_section(own, timed))
    return "\n\n".join(parts)


def _of(cells: Sequence[Mapping[str, Any]], model: str, task: str) -> list[Mapping[str, Any]]:
    return [c for c in cells if (c["fingerprint"]["model"]["name"], c["fingerprint"]["task"]["name"]) == (model, task)]


def _section(rows: Sequence[Row], timed: Mapping[tuple[str, str], float]) -> str:
    first = rows[0].fingerprint
    task, versions = first["task"], first["versions"]
    families = list(rows[0].families)
    scope = "test split" if task["limit"] is None else f"first {task['limit']} of each family of the test split"
    lines = [
        f"## {first['model']['name']} on {task['name']} {task['version']}",
        "",
        f"{scope}, {first['dtype']}, {first['attention']}, {first['device']}, torch {versions['torch']}, transformers {versions['transformers']}.",
    ]
    missing = [name for name in BASELINES if name not in {row.method for row in rows}]
    if missing:
        lines += ["", f"Rows that belong here and are missing: {', '.join(missing)}."]
    budgets = sorted({row.budget for row in rows if row.budget}, key=lambda b: -float(b.split()[-1]))
    free = [row for row in rows if not row.budget]
    lines += ["", *_table(free, None, families, timed)] if free else []
    for budget in budgets:
        same = [row for row in rows if row.budget == budget]
        lines += ["", f"### {budget}", "", *_table(same, next((r for r in same if r.method == "random"), None), families, timed)]
    return "\n".join(lines)


def _table(rows: Sequence[Row], random: Row | None, families: Sequence[str], timed: Mapping[tuple[str, str], float]) -> list[str]:
    head = ["method", *families, "macro", "against random", "tokens left", "average", "GFLOPs", *(["ms"] if timed else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda r: -r.macro.value):
        seeds = f" ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else ""
        cells = [row.method + seeds, *(percent(row.families[f]) for f in families), percent(row.macro), against(row, random)]
        cells += [f"{row.means['retained']:.1f}", f"{row.means['average_tokens']:.1f}", f"{1000 * row.means['tflops']:.2f}"]
        if timed:
            ms = timed.get((row.method, row.budget))
            cells.append("" if ms is None else f"{ms:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def against(row: Row, random: Row | None) -> str:
    """How a row's macro accuracy compares with `random` at its budget: better, worse, or not distinguishable, by a paired bootstrap."""
    if random is None or row is random:
        return ""
    step = paired_difference(row.outcomes, random.outcomes)
    verdict = "better" if step.low > 0 else "worse" if step.high < 0 else "not distinguishable"
    return f"{verdict} ({100 * step.value:+.1f})"
