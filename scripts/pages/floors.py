"""The floors that an embedded checkpoint must reach on `shapes`, so that what methods lose on it is information and not brittleness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from vtr.data.shapes import constant_accuracy
from vtr.eval.report.marked import has_block, with_block
from vtr.eval.run.cells import Cell, plan_cells
from vtr.eval.stats import paired_difference
from vtr.eval.summary import Row, make_rows, percent
from vtr.eval.tasks import Task, get_task
from vtr.files import write_atomic
from vtr.markdown import markdown_table
from vtr.types import Budget
from vtr.types.naming import FULL

SHARES = (2, 3, 4.5, 9, 18, 36)
"""`random` is measured at the tokens of an image divided by these: 288 to 16 of 576."""
KEEPS = tuple(int(576 / share) for share in SHARES)


def keeps_of(tokens: int) -> tuple[int, ...]:
    """Returns the budgets of a checkpoint that has so many tokens for an image of the benchmark."""
    return tuple(int(tokens / share) for share in SHARES)


class Floor(NamedTuple):
    """One rule, what was found, and whether it holds."""

    rule: str
    found: str
    passed: bool


def floor_cells(task: Task, seeds: Sequence[int], limit: int | None = None, keeps: Sequence[int] = KEEPS) -> list[Cell]:
    """Returns the cells that the floors are measured on: full, `random` at six budgets, `none`."""
    budgets = [Budget(keep=keep) for keep in keeps]
    return plan_cells([FULL, "random", "none"], budgets, [task], seeds, limit=limit)


def check_floors(rows: Sequence[Row], constants: Mapping[str, float], base: Row | None = None, keeps: Sequence[int] = KEEPS) -> list[Floor]:
    """Checks every floor of the embedded checkpoints.

    Args:
        rows: of `floor_cells`.
        constants: family -> accuracy of the best constant answer, in percent.
        base: row `full` of the checkpoint whose weights this one started from; reading must be at least as good.
        keeps: the six budgets of `random`, descending.

    Raises:
        ValueError: a row is missing.
    """
    full, none = _find(rows, FULL), _find(rows, "none")
    random = {keep: _find(rows, "random", keep) for keep in keeps}
    lowest = min(full.families, key=lambda family: full.families[family].value)
    gaps = {family: 100 * none.families[family].value - constants[family] for family in none.families}
    widest = max(gaps, key=lambda family: abs(gaps[family]))
    half, ninth = keeps[0], keeps[3]
    drop = {keep: 100 * (full.macro.value - random[keep].macro.value) for keep in (half, ninth)}
    floors = [
        Floor("full: macro accuracy at least 88 %", percent(full.macro), full.macro.value >= 0.88),
        Floor("full: no family under 70 %", f"{lowest} {percent(full.families[lowest])}", full.families[lowest].value >= 0.70),
        Floor("none: within 5 points of the best constant answer", f"{widest} {gaps[widest]:+.1f}", abs(gaps[widest]) <= 5),
        Floor(f"random at {ninth}: at least 8 points below full", f"{drop[ninth]:.1f} below", drop[ninth] >= 8),
        Floor(f"random at {half}: within 4 points of full", f"{drop[half]:.1f} below", drop[half] <= 4),
    ]
    for more, fewer in pairwise(keeps):
        step = paired_difference(random[more].outcomes, random[fewer].outcomes)
        rule = f"random: {fewer} not above {more}, up to the paired interval"
        floors.append(Floor(rule, f"{more} minus {fewer}: {percent(step)}", step.high >= 0))
    if base is not None:
        step = paired_difference({"text": full.outcomes["text"]}, {"text": base.outcomes["text"]})
        rule = f"full: reading at least as good as {base.fingerprint['model']['name']}"
        floors.append(Floor(rule, f"difference {percent(step)}", step.value >= 0))
    return floors


def floor_section(rows: Sequence[Row], floors: Sequence[Floor], constants: Mapping[str, float]) -> str:
    """Returns the Markdown that goes into a model card: accuracies and verdicts."""
    families = list(rows[0].families)
    first = rows[0].fingerprint
    seeds = sorted({seed for row in rows for seed in row.seeds})
    task, versions = first["task"], first["versions"]
    scope = "test split" if task["limit"] is None else f"first {task['limit']} of each family of the test split"
    lines = [
        f"Accuracy in percent on `{task['name']}` {task['version']} ({scope}) with 95 % intervals over samples; `random` is the mean of "
        f"seeds {', '.join(map(str, seeds))}.",
        f"{first['dtype']}, {first['attention']}, {first['device']}, torch {versions['torch']}, transformers {versions['transformers']}.",
        "",
    ]
    body = []
    for row in rows:
        name = {FULL: f"full ({row.means['retained']:.0f})", "none": "none (0)"}.get(row.method, f"{row.method} {row.keep}")
        body.append([name, *(percent(row.families[f]) for f in families), percent(row.macro)])
    mean = sum(constants[f] for f in families) / len(families)
    body.append(["best constant answer", *(f"{constants[f]:.1f}" for f in families), f"{mean:.1f}"])
    verdicts = [[floor.rule, floor.found, "pass" if floor.passed else "MISSED"] for floor in floors]
    lines += [markdown_table(["visual tokens", *families, "macro"], body), "", markdown_table(["floor", "found", ""], verdicts)]
    return "\n".join(lines)


class Measured(NamedTuple):
    """Rows of a checkpoint, its floors, and the accuracy of the best constant answer to each family in percent."""

    rows: list[Row]
    floors: list[Floor]
    constants: dict[str, float]


def measure(
    run: Callable[[Sequence[Cell], str], list[dict[str, Any]]],
    model: str,
    against: str | None,
    seeds: Sequence[int],
    limit: int | None,
    tokens: int = 576,
) -> Measured:
    """Measures a checkpoint and checks its floors.

    Args:
        run: `(cells, model) -> contents of result files`.
        model: embedded checkpoint.
        against: checkpoint whose reading must be reached.
        seeds: of `random`.
        limit: samples of each family, None for all.
        tokens: of an image of the benchmark.
    """
    keeps = keeps_of(tokens)
    cells = floor_cells(get_task("shapes"), seeds, limit, keeps)
    rows = make_rows(run(cells, model))
    base = make_rows(run(cells[:1], against))[0] if against else None
    constants = {family: constant_accuracy(family) for family in rows[0].families}
    return Measured(rows, check_floors(rows, constants, base, keeps), constants)


def floor_table(measured: Measured) -> Table:
    """Returns the accuracies for a terminal."""
    rows, _, constants = measured
    table = Table("visual tokens", *rows[0].families, "macro", box=None, header_style="bold")
    for row in rows:
        table.add_row(f"{row.method} {row.keep or ''}", *(percent(i) for i in row.families.values()), percent(row.macro))
    table.add_row("best constant", *(f"{constants[family]:.1f}" for family in rows[0].families), "")
    return table


def update_card(card: Path, section: str) -> None:
    """Puts the section between the two marks of a model card, at its end where it has none; the rest stays as it is.

    Raises:
        ValueError: no such file, or only one of the two marks.
    """
    if not card.is_file():
        raise ValueError(f"card: no file {str(card)!r}; write the model card first")
    text = card.read_text(encoding="utf-8")
    if not has_block(text, "floors"):
        text = f"{text.rstrip()}\n\n## Floors\n\n<!-- floors:begin -->\n<!-- floors:end -->\n"
    try:
        write_atomic(card, with_block(text, "floors", section))
    except ValueError as error:
        raise ValueError(f"card: {str(card)!r}: {error}") from None


def _find(rows: Sequence[Row], method: str, keep: int | None = None) -> Row:
    for row in rows:
        if row.method == method and (keep is None or row.keep == keep):
            return row
    raise ValueError(f"floors: no result for {method}{'' if keep is None else f' at {keep}'}; run all cells first")
