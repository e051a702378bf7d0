"""From folders of result files to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vtr.eval.report.averages import average_part
from vtr.eval.report.checks import check, check_models, check_speed
from vtr.eval.report.document import Document, Part
from vtr.eval.report.guard import guard
from vtr.eval.report.section import CONTEXT, Section
from vtr.eval.report.speed import Speed
from vtr.eval.report.tables import LEGEND, SCORER_LEGEND, SPEED_LEGEND, TIMES_LEGEND, make_tables, not_measured
from vtr.eval.run.failures import read_failures
from vtr.eval.run.results import ResultError, content_hash, read_cell
from vtr.eval.summary import Condensed, Known, condense
from vtr.types import BUDGETS
from vtr.types.errors import WrongValue
from vtr.types.naming import closest


def read_folders(folders: Iterable[Path], advance: Callable[[], None] = lambda: None) -> tuple[list[Condensed], list[str]]:
    """Returns all complete results of some folders, condensed one by one, and a line for each file that is not one and each cell that failed.

    An experiment that lies in two folders counts once; the line says when its answers differ.

    Args:
        folders: where `vtr eval` or `vtr sweep` wrote.
        advance: called after every file.
    """
    found: dict[str, Condensed] = {}
    known: Known = {}
    problems = []
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            try:
                cell = condense(read_cell(path), known, path.name)
            except ResultError as error:
                problems.append(f"ignored {error}")
            else:
                if not _agree(found.setdefault(cell.key, cell), cell):
                    problems.append(f"{path.name}: the same experiment with other outcomes lies in another folder; the first is shown")
            advance()
        failures, unreadable = read_failures(folder)
        problems += [f"ignored {line}" for line in unreadable]
        problems += [f"failed: {_failure(one)}" for one in failures if content_hash(one["fingerprint"]) not in found]
    return list(found.values()), problems


def _agree(first: Condensed, second: Condensed) -> bool:
    same = first.families.keys() == second.families.keys()
    return same and all(
        own.ids == second.families[f].ids and (own.values == second.families[f].values).all() for f, own in first.families.items()
    )


def _failure(failure: dict[str, Any]) -> str:
    """Returns a failed cell in words: `fastv keep=64 seed=1 on shapes: out of memory`."""
    fingerprint = failure["fingerprint"]
    settings = {**(fingerprint.get("settings") or {}), "seed": fingerprint.get("seed")}
    chosen = [f"{name}={settings[name]}" for name in (*BUDGETS, "seed") if settings.get(name) is not None]
    task = (fingerprint.get("task") or {}).get("name")
    return f"{' '.join([str(fingerprint.get('method')), *chosen])} on {task}: {failure['error']}"


def build(
    cells: Sequence[Condensed],
    times: Sequence[Condensed] = (),
    problems: Sequence[str] = (),
    timings: bool = True,
    plots: bool = False,
    speed: Sequence[Speed] = (),
    rival: str | None = None,
) -> Document:
    """Returns the report of these results: a part per model and task, a part per model over its tasks, every check.

    Args:
        cells: from `read_folders`.
        times: of the same experiments where they were timed, if these cells shared their tower.
        problems: lines to warn of first.
        timings: whether to show milliseconds and memory, which are never twice the same.
        plots: whether to draw.
        speed: records of `vtr bench`, from `read_speed`.
        rival: a method, or `full`, that every row is compared with, beside `random`.

    Raises:
        ValueError: there are no results of the rival.
    """
    sections = sections_of(cells, times, speed)
    warnings, parts = [*problems, *(check_speed(sections, speed) if timings else [])], []
    if rival is not None:
        check_rival(cells, rival)
    guards = [line for section in sections for line in guard(section)]
    by_model: dict[str, list[Section]] = {}
    for index, section in enumerate(sections):
        by_model.setdefault(section.name, []).append(section)
        warnings += check(section, timings, rival)
        part = Part(section.name, section.title, _scope(section, timings), make_tables(section, timings, rival))
        if plots:
            from vtr.eval.report.plots import make_figures

            part.figures = make_figures(section, timings, f"{index + 1}.")
        parts.append(part)
    for own in by_model.values():
        if averaged := average_part(own):
            parts.append(averaged[0])
            warnings += [*averaged[1], *check_models(own)]
    legend = [
        *LEGEND,
        *([SCORER_LEGEND] if any("scorer_visual_tokens" in row.means for section in sections for row in section.rows) else []),
        *([TIMES_LEGEND] if timings else []),
        *([SPEED_LEGEND] if timings and speed else []),
        "blank: not measured in that run",
    ]
    return Document(warnings, parts, legend, guards)


def check_rival(cells: Sequence[Condensed], rival: str) -> None:
    """Refuses a method to compare with that was not run.

    Raises:
        ValueError: none of the results is of it, with the closest that are.
    """
    names = sorted({str(cell.fingerprint["method"]) for cell in cells})
    if rival not in names:
        raise WrongValue(f"--against: there are no results of {rival!r} here{closest(rival, names)}; run it first, or name another method")


def sections_of(cells: Sequence[Condensed], times: Sequence[Condensed] = (), speed: Sequence[Speed] = ()) -> list[Section]:
    """Returns one section for each model with its weights and each task with its version."""
    groups, timed = _by_section(cells), _by_section(times)
    models = {(str(own[0].fingerprint["model"]["name"]), content_hash(own[0].fingerprint["model"])) for own in groups.values()}
    names = [name for name, _ in models]
    return [
        Section(own, timed.get(key, ()), speed, names.count(str(own[0].fingerprint["model"]["name"])) == 1) for key, own in groups.items()
    ]


def _by_section(cells: Sequence[Condensed]) -> dict[str, list[Condensed]]:
    """Returns one group for each model with its weights and each task with its version, in alphabetical order."""
    found: dict[tuple[str, str, str], list[Condensed]] = {}
    for cell in cells:
        model, task = cell.fingerprint["model"], {k: v for k, v in cell.fingerprint["task"].items() if k != "limit"}
        found.setdefault((str(model["name"]), str(task["name"]), content_hash([model, task])), []).append(cell)
    return {key[-1]: found[key] for key in sorted(found)}


def _scope(section: Section, timings: bool) -> str:
    first = section.rows[0].fingerprint
    counts = {sum(map(len, row.samples.values())) for row in section.rows}
    limits = {row.fingerprint["task"].get("limit") for row in section.rows}
    limited = f" (the first {next(iter(limits))} of each family)" if len(limits) == 1 and None not in limits else ""
    words = [f"{' or '.join(map(str, sorted(counts)))} samples{limited}"]
    for name in CONTEXT[:3]:
        words.append(" and ".join(sorted({str(row.fingerprint.get(name)) for row in section.rows})))
    versions = first.get("versions") or {}
    words += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    scorers = sorted({row.fingerprint["frame_scores"]["name"] for row in section.rows if row.fingerprint.get("frame_scores")})
    absent = not_measured(section, timings)
    said = [", ".join(words), *([f"Not measured in any of these runs: {', '.join(absent)}"] if absent else [])]
    said += [f"Frames scored by {' and '.join(scorers)}"] if scorers else []
    if timings:
        shown = [speed for speed in section.speed if any(map(speed.of, section.rows))]
        said += [f"Speed from {speed.source} of vtr bench: {speed.where}" for speed in shown]
    return "".join(f"{sentence}. " for sentence in said).rstrip()
