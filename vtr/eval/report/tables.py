"""The tables of one model on one task: scores, cost and ranking at every budget, and measured against published."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vtr.cost import CONVENTION
from vtr.eval.report.differences import ablation_tables, against_table, compared
from vtr.eval.report.document import Cell, Table, number, share
from vtr.eval.report.published import find_published
from vtr.eval.report.section import AT_A_BUDGET, BASELINES, Measure, Section, budget_title, is_timing
from vtr.eval.report.speed import Speed
from vtr.eval.stats import Interval
from vtr.eval.summary import Row, percent
from vtr.eval.tasks import name_in_source
from vtr.types.naming import FULL

COLUMNS = (
    Measure("retained", "tokens left"),
    Measure("average_tokens", "average tokens"),
    Measure("tflops", "GFLOPs", 1000),
    Measure("kv_mib_fp16", "KV MiB"),
    Measure("latency_ms", "total ms"),
)
SCORER_COLUMNS = (
    Measure("scorer_visual_tokens", "scorer tokens"),
    Measure("scorer_tflops", "scorer GFLOPs", 1000),
    Measure("scorer_seconds", "scorer s"),
)
"""Shown only where a row has scores of frames by a second model."""
SPEED_COLUMNS = (
    Measure("choosing_ms", "choosing ms"),
    Measure("prefill_ms", "prefill ms"),
    Measure("prefill_floor_ms", "prefill floor ms"),
    Measure("prefill_kept_floor_ms", "prefill kept floor ms"),
    Measure("latency_ms", "total ms"),
    Measure("latency_floor_ms", "total floor ms"),
    Measure("peak_mib", "peak MiB"),
)

LEGEND = (
    "scores: percent with 95 % intervals over samples (Wilson; with several seeds a bootstrap over samples and seeds); "
    "macro: unweighted mean over families",
    "relative accuracy: macro in percent of that of `full`, paired bootstrap over samples and seeds",
    "against random: macro minus that of `random` at the same budget in points, paired bootstrap; 'not distinguishable' = the interval "
    "contains 0; every interval is at 95 %, not corrected for the number of rows",
    "against another method, or another value of a setting: the same difference to that row; (renumbered): a method whose survivors get positions "
    "0, 1, 2, ..., where others here keep theirs",
    "tokens left: visual tokens measured at the end of the LLM; average tokens: mean over its layers",
    f"GFLOPs: prefill of the LLM from the measured tokens of every layer, {CONVENTION}; KV MiB: keys and values after it, 16 bits each",
    "rank: 1 is best, with the interval that 95 % of the resampled rankings give it",
)
SCORER_LEGEND = (
    "scorer: what the second model takes, which says how much each frame has to do with the question, per question and on top of the other "
    "columns: its visual tokens, the prefills of its LLM, seconds with its tower"
)
TIMES_LEGEND = (
    "total ms of a cost table: per sample in the runs that gave the scores, answers as long as they came, tower and choosing included"
)
SPEED_LEGEND = (
    "speed: from runs of `vtr bench` by themselves, not from those that gave the scores; ms: per sample (a batch / its size), median over rounds, "
    "vision tower and choosing included; floor: the same weights hand-cut to the same tokens of every layer, without selection; kept floor: given "
    "only the kept tokens from the start; peak: memory of a batch's prefill on top of weights and prompts"
)


def make_tables(section: Section, timings: bool = True, rival: str | None = None) -> list[Table]:
    """Returns all tables of a section, from the largest budget to the smallest, rows without a budget first.

    Args:
        section: what was measured.
        timings: whether to show milliseconds and memory.
        rival: a method that every row is compared with, too.
    """
    tables = []
    others = [row for row in section.free if row.method not in (FULL, "none")]
    if others or not section.budgets:
        tables += _group(section, "without a budget", section.free, [], timings, rival)
    for rows in section.budgets.values():
        shared = [row for row in section.free if row.method in (FULL, "none")]
        tables += _group(section, budget_title(rows), rows, shared, timings, rival)
    published = published_table(section)
    return tables + ([published] if published else [])


def _group(section: Section, title: str, rows: Sequence[Row], shared: Sequence[Row], timings: bool, rival: str | None) -> list[Table]:
    shown = sorted([*rows, *shared], key=lambda row: (row.method != FULL, -row.macro.value, section.labels[row]))
    tables = [_scores(section, title, shown), _cost(section, f"{title}: cost", shown, timings)]
    tables += [_speed(section, title, speed, shown) for speed in section.speed if timings and any(map(speed.of, rows))]
    ranked = [row for row in rows if row in section.resamples and row.method not in (FULL, "none")]
    if len(ranked) > 1:
        tables.append(_ranking(section, f"{title}: ranking", ranked))
    differences = against_table(section, title, shown, rival) if rival is not None else None
    return [*tables, *([differences] if differences else []), *ablation_tables(section, title, rows)]


def missing_baselines(section: Section, rows: Sequence[Row]) -> list[str]:
    """Baselines that should stand beside these rows of one budget, or beside rows without a budget."""
    wanted = (
        BASELINES if any(row.budget for row in rows) else [name for name in BASELINES if name not in AT_A_BUDGET or not section.budgets]
    )
    there = {row.method for row in [*rows, *section.free]}
    there |= {"resize" for row in section.free if row.method == FULL and row.fingerprint.get("max_pixels")}  # fewer pixels are fewer tokens
    return [name for name in wanted if name not in there]


def _scores(section: Section, title: str, rows: Sequence[Row]) -> Table:
    families = list(dict.fromkeys(family for row in rows for family in row.families))
    metrics = sorted({name for row in rows for name in row.metrics})
    macro = ("macro",) if len(families) > 1 else ()
    columns = ("method", *families, *macro, *metrics, "relative accuracy", "against random")
    lines = []
    for row in rows:
        complete = set(row.families) == set(section.reference)
        scores = [share(row.families.get(family)) for family in families]
        scores += [share(row.macro) if complete else Cell()] if macro else []
        scores += [number(row.metrics.get(name)) for name in metrics]
        full = section.full(row)
        relative = section.resamples.relative(row, full) if full and full is not row else None
        lines.append((Cell(section.shown(row)), *scores, share(relative), against(section, row)))
    return Table(title, columns, (*lines, *_not_run(section, rows, len(columns))))


def _not_run(section: Section, rows: Sequence[Row], width: int) -> list[tuple[Cell, ...]]:
    missing = missing_baselines(section, rows)
    return [(Cell(f"{name} (not run)", mark="missing"), *[Cell()] * (width - 1)) for name in missing]


def against(section: Section, row: Row) -> Cell:
    """Returns how a row compares with `random` at its budget: better, worse, or not distinguishable."""
    random = section.random(row)
    return Cell() if random is None or row.method == "random" else compared(section, row, random, judge=True)


def _cost(section: Section, title: str, rows: Sequence[Row], timings: bool) -> Table:
    measured = {row: section.measured(row) for row in rows}
    shown = [
        m for m in (*COLUMNS, *SCORER_COLUMNS) if (timings or not is_timing(m.name)) and any(m.name in own for own in measured.values())
    ]
    lines = [(Cell(section.shown(row)), *(number(measured[row].get(m.name), m.scale) for m in shown)) for row in rows]
    return Table(title, ("method", *(m.words for m in shown)), (*lines, *_not_run(section, rows, 1 + len(shown))))


def _speed(section: Section, title: str, speed: Speed, rows: Sequence[Row]) -> Table:
    shown = [m for m in SPEED_COLUMNS if any(m.name in speed.of(row) for row in rows)]
    heads = (m.words.replace("total", f"{speed.tokens} tokens") for m in shown)
    lines = [(Cell(section.shown(row)), *(number(speed.of(row).get(m.name), m.scale) for m in shown)) for row in rows if speed.of(row)]
    several = len({other.source for other in section.speed}) > 1
    return Table(f"{title}: speed, batch {speed.batch}" + (f" ({speed.source})" if several else ""), ("method", *heads), tuple(lines))


def not_measured(section: Section, timings: bool) -> list[str]:
    """Columns that no row of the section has a number for."""
    there = {name for row in section.rows for name in section.measured(row)}
    absent = [m.words for m in COLUMNS if m.name not in there and (timings or not is_timing(m.name))]
    timed = any(speed.of(row) for speed in section.speed for row in section.rows)
    return absent + [m.words for m in SPEED_COLUMNS if timings and not timed and m.words not in absent and m.name not in there]


def _ranking(section: Section, title: str, rows: Sequence[Row]) -> Table:
    families: list[str | None] = list(section.reference)
    families += [None] if len(families) > 1 else []
    ranks = [section.resamples.ranks(rows, family) for family in families]
    order = sorted(range(len(rows)), key=lambda i: (ranks[-1][i].value, section.labels[rows[i]]))
    lines = tuple((Cell(section.shown(rows[i])), *(_rank(column[i]) for column in ranks)) for i in order)
    return Table(title, ("method", *(family or "macro" for family in families)), lines)


def _rank(rank: Interval) -> Cell:
    return Cell(f"{rank.value:.0f} ({rank.low:.0f}-{rank.high:.0f})", *rank)


def published_table(section: Section, find: Callable = find_published) -> Table | None:
    """Returns every published number for what was measured here, by source; None where nothing was published.

    Args:
        section: what was measured.
        find: as `vtr.eval.report.published.find_published`.
    """
    lines = []
    for row in section.rows:
        if row.changed_settings() or not {"average_tokens", "visual_tokens"} <= set(row.means):
            continue  # papers publish their own settings, which are the defaults
        tokens = row.means["average_tokens"]
        found = find(section.model, row.method, tokens, row.means["visual_tokens"], name_in_source(section.task))
        if not found:
            continue
        measured = "; ".join([f"{percent(row.macro)} %", *(f"{name} {value:.4g}" for name, value in row.metrics.items())])
        unit = ", ".join(dict.fromkeys(value.unit for value in found.values))
        conflict = f"{found.lowest:g} to {found.highest:g}" if found.conflict else ""
        score = Cell(measured, 100 * row.macro.value)
        lines.append((Cell(section.shown(row)), Cell(row.budget), number(tokens), score, Cell(str(found)), Cell(unit), Cell(conflict)))
    columns = ("method", "budget", "average tokens", "measured", "published (source)", "unit", "sources disagree")
    return Table("measured against published", columns, tuple(lines)) if lines else None
