"""From the file of a sweep to its cells: every combination that differs, checked against the models before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vtr.apply import reduced
from vtr.eval.cells import FULL, Cell, variants
from vtr.eval.forecast import misfits, sketch
from vtr.eval.sweep.reading import Mistake, Place, SweepError, read_sweep
from vtr.eval.sweep.schema import ALL, Member, ModelEntry, SweepFile
from vtr.eval.tasks import Task, get_task, list_tasks
from vtr.eval.workers import Job, Setup
from vtr.registry import closest, create_method, default_settings, list_methods, method_class, with_settings
from vtr.types import BUDGETS, Budget, Method, VtrError

Variant = tuple[Method | tuple[Method, ...] | None, int | None]


@dataclass
class Sweep:
    """What a file came to.

    Args:
        file: as read, with the changes of the command line.
        name: of the file, without `.yaml`.
        jobs: every cell, models and tasks in the order of the file.
        left_out: methods that `all` stood for and that do not fit a model, with the reason.
    """

    file: SweepFile
    name: str
    jobs: list[Job]
    left_out: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where results go unless the command line says otherwise."""
        return Path(self.file.out or Path("out") / "sweeps" / self.name)


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read, check and expand a sweep.

    Raises:
        SweepError: everything that is wrong with it: keys, names, settings, values, budgets that a model cannot meet.
        ValueError: no such file, or an override that makes no sense.
    """
    file, mistakes, lines = read_sweep(path, overrides)
    wrong = {mistake.place[0] for mistake in mistakes if mistake.place}
    for key in ("models", "tasks", "methods"):
        if not getattr(file, key) and key not in wrong and not (key == "methods" and (file.plans or "plans" in wrong)):
            mistakes.append(Mistake((key,), "must name at least one, got nothing" + (" and no plans" if key == "methods" else "")))
    mistakes += _setting_mistakes(file, "methods" in wrong)
    tasks = [get_task(name) for name in file.tasks]
    jobs: list[Job] = []
    left_out: list[str] = []
    for number, entry in enumerate(file.models):
        jobs += _model_jobs(file, entry, tasks, ("models", number), mistakes, left_out)
    if mistakes:
        raise SweepError(path, list(dict.fromkeys(mistakes)), lines)
    if not jobs:
        raise SweepError(path, [Mistake((), "no cell is left to run: " + "; ".join(left_out))])
    return Sweep(file, Path(path).stem, jobs, left_out)


def _setting_mistakes(file: SweepFile, unsure: bool) -> list[Mistake]:
    """Settings one by one, so that all wrong ones are found; they are taken out of the file. `unsure`: methods may be missing by a mistake."""
    found = []
    named = _names(file)
    for name, grids in list(file.settings.items()):
        if name == FULL or name not in (ALL, *named):
            if unsure and name != FULL:
                continue
            reason = "is the model without reduction and has no settings" if name == FULL else "is not among the methods of this sweep"
            found.append(Mistake(("settings", name), f"{name!r} {reason}; leave it out"))
            del file.settings[name]
            continue
        classes = [method_class(n) for n in (named if name == ALL else [name]) if n != FULL]
        for grid in grids:
            for setting, values in list(grid.items()):
                having = [cls for cls in classes if setting in _settings_of(cls)]
                if not having:
                    known = sorted({s for cls in classes for s in _settings_of(cls)})
                    text = f"unknown setting {setting!r} of {name}{closest(setting, known)}; settings: {', '.join(known)}"
                    found.append(Mistake(("settings", name, setting), text))
                    del grid[setting]
                for value in values if having else []:
                    problem = next(filter(None, (_problem(cls, setting, value) for cls in having)), None)
                    if problem:
                        found.append(Mistake(("settings", name, setting), problem))
                        grid[setting] = [v for v in grid[setting] if v is not value]
    return found


def _problem(cls: type[Method], setting: str, value: Any) -> str | None:
    try:
        create_method(cls.name, **{setting: value})
    except ValueError as error:
        return str(error)
    except TypeError as error:
        ours = str(error).startswith(cls.name)  # else the interpreter stumbled over the value
        return str(error) if ours else f"{cls.name}: {setting} cannot be {value!r}; its default is {default_settings(cls)[setting]!r}"
    return None


def _settings_of(cls: type[Method]) -> list[str]:
    names = [f.name for f in fields(cls)]
    return [n for n in names if n not in BUDGETS] if cls.default_budget is None else names


def _names(file: SweepFile) -> list[str]:
    """Methods in the order of the file, `all` spelled out."""
    every = [FULL, *list_methods()]
    return list(dict.fromkeys(n for name in file.methods for n in (every if name == ALL else [name])))


def _model_jobs(
    file: SweepFile, entry: ModelEntry, tasks: Sequence[Task], place: Place, mistakes: list[Mistake], left_out: list[str]
) -> list[Job]:
    setup = Setup(
        entry.model,
        entry.device if entry.device is not None else file.device,
        entry.dtype or file.dtype,
        entry.attention or file.attention,
        entry.batch_size or file.batch_size,
        file.share_tower,
    )
    try:
        sketch(setup)
    except (ValueError, VtrError) as error:
        mistakes.append(Mistake(place, str(error)))
        return []
    file = file.model_copy(update={name: value for name in ("budgets", "seeds", "limit") if (value := getattr(entry, name)) is not None})
    wanted = file.budgets
    budgets = wanted.values() if wanted else []
    groups: list[tuple[Place, bool, list[Variant]]] = []
    for name in _names(file):
        optional = name not in file.methods
        here: Place = ("settings", name) if name in file.settings else ("methods", 0 if optional else file.methods.index(name))
        for grid in _grids(file, name):
            try:
                made = variants(name, budgets, file.seeds, grid)
                groups.append((here, optional, [(_equalised(file, setup, method), seed) for method, seed in made]))
            except (ValueError, TypeError) as error:
                if optional:
                    left_out.append(str(error))
                else:
                    mistakes.append(Mistake(here, str(error)))
    for number, members in enumerate(file.plans):
        try:
            groups.append((("plans", number), False, list(_plans(file, setup, members, budgets))))
        except (ValueError, TypeError) as error:
            mistakes.append(Mistake(("plans", number), str(error)))
    jobs: list[Job] = []
    seen: list[Variant] = []
    reasons: dict[tuple[Place, str], list[str]] = {}
    probe = tasks[0] if tasks else get_task(list_tasks()[0])
    for here, optional, group in groups:
        found = [variant for i, variant in enumerate(group) if variant not in seen and variant not in group[:i]]
        seen += found
        cells = [_cell(file, variant, probe) for variant in found]
        bad = misfits(setup, cells)
        for cell, reason in bad:
            head, _, rest = reason.partition(": ")
            if "out of reach" in rest and file.equalise == "average_keep" and wanted and wanted.keep:
                rest += "; or write `equalise: keep`, which leaves that many at the end"
            if optional:
                left_out.append(f"{entry.model}: {reason}")
            else:
                reasons.setdefault((here, rest or head), []).append(cell.label)
        unfit = {id(cell) for cell, _ in bad}
        fitting = [variant for variant, cell in zip(found, cells, strict=True) if id(cell) not in unfit]
        jobs += [Job(setup, _cell(file, variant, task)) for task in tasks for variant in fitting]
    mistakes += [Mistake(here, f"{', '.join(dict.fromkeys(who))} on {entry.model}: {text}") for (here, text), who in reasons.items()]
    return jobs


def _grids(file: SweepFile, name: str) -> list[dict[str, Any]]:
    """Every combination of the settings to try for a method."""
    if name == FULL:
        return [{}]
    known = _settings_of(method_class(name))
    shared = [{k: v for k, v in grid.items() if k in known} for grid in file.settings.get(ALL, [])] or [{}]
    own = file.settings.get(name, [{}])
    merged = [{**one, **two} for one in shared for two in own]
    found = [dict(zip(grid, values, strict=True)) for grid in merged for values in itertools.product(*grid.values())]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _equalised(file: SweepFile, setup: Setup, method: Method | None) -> Method | None:
    """With `average_keep` in place of `keep` for methods whose first removal is inside the LLM, where the sweep asks for that."""
    if method is None or method.keep is None or file.equalise == "keep":
        return method
    try:
        with reduced(sketch(setup), method, question="") as reduction:
            removing = [step for step in reduction.plan.steps if step.removes]
    except (ValueError, TypeError, VtrError):
        return method  # reported where it is checked
    inside = bool(removing) and removing[0].step.stage == "prefill"
    return with_settings(method, average_keep=float(method.keep)) if inside else method


def _plans(file: SweepFile, setup: Setup, members: Sequence[Member], budgets: Sequence[Budget]) -> Iterator[Variant]:
    """The sweep's budgets are for the last method of a plan, unless it names its own."""
    last = members[-1]
    free = method_class(last.method).default_budget is not None and not any(k in last.settings for k in BUDGETS)
    seeded = any("seed" in _settings_of(method_class(m.method)) and "seed" not in m.settings for m in members)
    for budget in [*budgets] if free and budgets else [None]:
        for seed in file.seeds if seeded else [None]:
            made: list[Method] = []
            for member in members:
                settings = dict(member.settings)
                if seed is not None and "seed" in _settings_of(method_class(member.method)):
                    settings.setdefault("seed", seed)
                if member is last and budget is not None:
                    settings |= {k: getattr(budget, k) for k in BUDGETS if getattr(budget, k) is not None}
                method = create_method(member.method, **settings)
                made.append((_equalised(file, setup, method) if member is last else method) or method)
            yield tuple(made), seed


def _cell(file: SweepFile, variant: Variant, task: Task) -> Cell:
    return Cell(variant[0], task, variant[1], file.limit, file.max_new_tokens)
