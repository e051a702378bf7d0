"""From the file of a sweep to its cells: every combination that differs, checked against the models before anything runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from vtr.eval.run.cells import Cell, changed_settings, variants
from vtr.eval.run.forecast import final_keep, forecast, misfits
from vtr.eval.run.setup import Setup, shown_as, sketch, visuals_as
from vtr.eval.run.workers import Job
from vtr.eval.sweep.checking import absent_devices, find_mistakes, names_of, settings_of, without_moved
from vtr.eval.sweep.reading import Mistake, Place, SweepError, read_sweep
from vtr.eval.sweep.schema import ALL, Budgets, Member, ModelEntry, SweepFile
from vtr.eval.tasks import Task, get_task, list_tasks
from vtr.hosts._protocol import host_of
from vtr.models.pixels import PixelLimits
from vtr.planning import plan
from vtr.plans import FEWEST
from vtr.registry import create_method, method_class
from vtr.types import BUDGETS, Budget, Method, VtrError
from vtr.types.errors import SettingError, setting_of
from vtr.types.method import with_settings
from vtr.types.naming import FULL

Variant = tuple[Method | tuple[Method, ...] | None, int | None]


@dataclass
class Sweep:
    """The cells of a sweep file.

    Args:
        file: as read, with the changes of the command line.
        name: of the file, without `.yaml`.
        jobs: every cell, models and tasks in the order of the file.
        left_out: cells of methods that `all` stood for and that do not fit a model, with the reason.
        elsewhere: devices that this machine does not have.
    """

    file: SweepFile
    name: str
    jobs: list[Job]
    left_out: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where results go unless the command line says otherwise."""
        return Path(self.file.out or Path("out") / "sweeps" / self.name)


def load_sweep(path: str | Path, overrides: Sequence[str] = (), here: bool = False) -> Sweep:
    """Reads, checks and expands a sweep.

    Args:
        path, overrides: as for `read_sweep`.
        here: it is to run on this machine, so that its devices must be there.

    Raises:
        SweepError: everything that is wrong with it: keys, names, settings, values, budgets that a model cannot meet.
        ValueError: no such file, or an override that makes no sense.
    """
    file, mistakes, lines = read_sweep(path, overrides)
    earlier = list(mistakes)
    wrong = {mistake.place[0] for mistake in mistakes if mistake.place}
    for key in ("models", "tasks", "methods"):
        if not getattr(file, key) and key not in wrong and not (key == "methods" and (file.plans or "plans" in wrong)):
            mistakes.append(Mistake((key,), "must name at least one, got nothing" + (" and no plans" if key == "methods" else "")))
    mistakes += find_mistakes(file, mistakes)
    absent = absent_devices(file)
    mistakes += absent if here else []
    tasks = [get_task(name) for name in file.tasks]
    jobs: list[Job] = []
    left_out: list[str] = []
    for number, entry in enumerate(file.models):
        found = _model_jobs(file, entry, tasks, ("models", number))
        jobs += found.jobs
        mistakes += found.mistakes
        left_out += found.left_out
    mistakes += [] if mistakes else _unread_scores(file, jobs)
    if mistakes:
        later = without_moved(mistakes[len(earlier) :], earlier)
        raise SweepError(path, list(dict.fromkeys([*earlier, *later])), lines)
    if not jobs:
        raise SweepError(path, [Mistake((), "no cell is left to run: " + "; ".join(left_out))])
    return Sweep(file, Path(path).stem, jobs, left_out, [one.text for one in absent])


def _unread_scores(file: SweepFile, jobs: Sequence[Job]) -> list[Mistake]:
    """Returns the keys `frame_scores` that no cell reads."""
    readers = {(job.setup.model, job.setup.frame_scores) for job in jobs if job.cell.reads_frame_scores and job.cell.task.frames}
    shared = any(name == file.frame_scores for _, name in readers)
    given: list[tuple[Place, bool]] = [(("frame_scores",), shared)] if file.frame_scores else []
    entries = ((n, entry) for n, entry in enumerate(file.models) if entry.frame_scores)
    given += [(("models", n, "frame_scores"), (entry.model, entry.frame_scores) in readers) for n, entry in entries]
    return [
        Mistake(place, "no method of this sweep reads scores of frames on its tasks; leave it out") for place, read in given if not read
    ]


@dataclass
class _Found:
    """Cells, mistakes and cells left out of one model of a sweep."""

    jobs: list[Job] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class _Group(NamedTuple):
    """Variants of one entry of the file, its place there, and whether they come from `all`, so that those that do not fit are left out."""

    place: Place
    optional: bool
    variants: list[Variant]


def _model_jobs(file: SweepFile, entry: ModelEntry, tasks: Sequence[Task], place: Place) -> _Found:
    """Expands the sweep for one model, whose entry is at `place` of the file."""
    found = _Found()
    try:
        setup = _setup(file, entry)
        sketch(setup)
    except (ValueError, VtrError) as error:
        found.mistakes.append(Mistake(place, str(error)))
        return found
    file = file.model_copy(
        update={name: value for name in ("methods", "budgets", "seeds", "limit") if (value := getattr(entry, name)) is not None}
    )
    groups = [*_method_groups(file, setup, found, place if entry.methods else ()), *_plan_groups(file, setup, found)]
    above = place if entry.budgets else ()  # the key `budgets` is in the model's entry, or at the top of the file
    seen: list[Variant] = []
    reasons: dict[tuple[Place, str], list[str]] = {}
    probes = {
        bool(task.frames): task for task in reversed(tasks or [get_task(list_tasks()[0])])
    }  # a model may be shown videos in another way
    for group in groups:
        new = [variant for i, variant in enumerate(group.variants) if variant not in seen and variant not in group.variants[:i]]
        seen += new
        cells = [_cell(file, variant, probe) for variant in new for probe in probes.values()]
        bad = misfits(setup, cells)
        bad += [(cell, why) for cell in cells if all(cell is not one for one, _ in bad) and (why := _below_floor(setup, cell))]
        for where, cell, why in itertools.chain(*(_every_reason(file, setup, group.place, *one) for one in bad)):
            if file.budgets and (setting_of(why) or "") in BUDGETS and not isinstance(cell.method, tuple):
                where = (*above, *_budget_place(file.budgets, cell))
            text = _without_name(why) + _equalised_hint(file, why)
            if group.optional:
                found.left_out.append(f"{cell.label} on {entry.model}{_of_kind(cell, probes)}: {text}")
            else:
                reasons.setdefault((where, text), []).append(cell.label)
        unfit = [(cell.method, cell.seed, bool(cell.task.frames)) for cell, _ in bad]
        found.jobs += [
            Job(setup, _cell(file, variant, task)) for task in tasks for variant in new if (*variant, bool(task.frames)) not in unfit
        ]
    for (where, text), who in reasons.items():
        found.mistakes.append(Mistake(where, f"{', '.join(dict.fromkeys(who))} on {entry.model}: {text}"))
    return found


def _of_kind(cell: Cell, probes: Mapping[bool, Task]) -> str:
    """Returns which tasks a cell that does not fit stands for, where the sweep has tasks with videos and others."""
    return "" if len(probes) == 1 else " with videos" if cell.task.frames else " with images"


def _setup(file: SweepFile, entry: ModelEntry) -> Setup:
    """Returns how the model of an entry is loaded; what the entry leaves out is as for the whole sweep."""
    return Setup(
        entry.model,
        entry.device if entry.device is not None else file.device,
        entry.dtype or file.dtype,
        entry.attention or file.attention,
        entry.batch_size or file.batch_size,
        file.share_tower,
        PixelLimits(entry.min_pixels or file.min_pixels, entry.max_pixels or file.max_pixels),
        entry.visuals or file.visuals,
        entry.frame_scores or file.frame_scores,
    )


def _method_groups(file: SweepFile, setup: Setup, found: _Found, above: Place) -> Iterator[_Group]:
    """Variants of every method, a group for each combination of its settings; what cannot be made goes to `found`. `methods` stands below `above`."""
    budgets = file.budgets.values() if file.budgets else []
    for name in names_of(file):
        optional = name not in file.methods
        named: Place = (*above, "methods", 0 if optional else file.methods.index(name))
        place: Place = ("settings", name) if name in file.settings else named
        for grid in _grids(file, name):
            try:
                made = variants(name, budgets, file.seeds, grid)
                group = _Group(place, optional, [(_equalised(file, setup, method), seed) for method, seed in made])
            except (ValueError, TypeError) as error:
                if optional:
                    found.left_out.append(str(error))
                else:
                    found.mistakes.append(Mistake(place, str(error)))
            else:
                yield group


def _plan_groups(file: SweepFile, setup: Setup, found: _Found) -> Iterator[_Group]:
    """Variants of every plan; one that cannot be made is a mistake in `found`."""
    budgets = file.budgets.values() if file.budgets else []
    for number, members in enumerate(file.plans):
        try:
            group = _Group(("plans", number), False, list(_plans(file, setup, members, budgets)))
        except (ValueError, TypeError) as error:
            found.mistakes.append(Mistake(("plans", number), str(error)))
        else:
            yield group


def _without_name(error: Exception) -> str:
    """Returns the message without the method in front of it, so that methods with one reason share a line."""
    head, _, rest = str(error).partition(": ")
    return rest or head


def _equalised_hint(file: SweepFile, error: Exception) -> str:
    """Returns the way out of a mean that the sweep, and not the user, asked a method for."""
    asked = setting_of(error) == "average_keep" and file.equalise == "average_keep" and file.budgets and file.budgets.keep
    return "; or write `equalise: keep`, which leaves that many at the end" if asked else ""


def _every_reason(file: SweepFile, setup: Setup, place: Place, cell: Cell, error: Exception) -> list[tuple[Place, Cell, Exception]]:
    """Returns why a cell does not fit its model. A method raises only its first reason, so each of its settings is tried by itself."""
    found: list[tuple[Place, Cell, Exception]] = []
    if isinstance(cell.method, Method):
        own = {name for grid in file.settings.get(cell.name, []) for name in grid}
        changed = {k: v for k, v in changed_settings(cell.method).items() if k not in BUDGETS}
        for name, value in changed.items() if cell.name in file.settings or ALL in file.settings else ():
            with contextlib.suppress(ValueError, TypeError):  # it needs another one beside it
                alone = create_method(cell.name, **_given_budget(cell.method), **{name: value})
                where = ("settings", cell.name if name in own else ALL, name)
                found += [(where, bad, why) for bad, why in misfits(setup, [replace(cell, method=alone)])]
    return found or [(place, cell, error)]


def _below_floor(setup: Setup, cell: Cell) -> Exception | None:
    """Returns why a cell cannot meet its mean over the layers, or would leave almost nothing at the end; None where it may."""
    index = next((i for i, method in enumerate(cell.methods) if method.average_keep is not None), None)
    if index is None:
        return None
    method = cell.methods[index]
    wanted = method.average_keep or 0
    try:
        left = final_keep(setup, cell, index)
    except ValueError as error:  # with AnyRes it depends on the image, and the largest one decides
        return error
    if left is None or left >= min(FEWEST, int(wanted)):
        return None
    fewest = replace(cell, method=(*cell.methods[:index], with_settings(method, keep=FEWEST), *cell.methods[index + 1 :]))
    smallest = forecast(setup, fewest)
    assert smallest is not None  # as `left`
    return SettingError(
        f"{method.name}: average_keep={wanted:g} would leave {left} at the end, a sweep leaves {FEWEST} or more; "
        f"the smallest average with {FEWEST} is {smallest.average:.1f}, ask for that much",
        setting="average_keep",
    )


def _given_budget(method: Method) -> dict[str, Any]:
    return {name: getattr(method, name) for name in BUDGETS if getattr(method, name) is not None}


def _budget_place(budgets: Budgets, cell: Cell) -> Place:
    """Returns the place of a cell's budget, below the parent of the key `budgets`; `keep` may have become `average_keep`."""
    (value,) = _given_budget(cell.methods[-1]).values()
    found = ((kind, own.index(value)) for kind in BUDGETS if value in (own := getattr(budgets, kind)))
    return ("budgets", *next(found, ()))


def _grids(file: SweepFile, name: str) -> list[dict[str, Any]]:
    """Returns every combination of the settings to try for a method."""
    if name == FULL:
        return [{}]
    known = settings_of(method_class(name))
    shared = [{k: v for k, v in grid.items() if k in known} for grid in file.settings.get(ALL, [])] or [{}]
    own = file.settings.get(name, [{}])
    merged = [{**one, **two} for one in shared for two in own]
    found = [dict(zip(grid, values, strict=True)) for grid in merged for values in itertools.product(*grid.values())]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _equalised(file: SweepFile, setup: Setup, method: Method | None) -> Method | None:
    """Returns the method with `average_keep` in place of `keep` if its first removal is inside the LLM and the sweep wants that."""
    if method is None or method.keep is None or file.equalise == "keep":
        return method
    try:
        model = sketch(setup)
        shown = visuals_as(shown_as(host_of(model), any(get_task(name).frames for name in file.tasks), setup.visuals))
        removing = [step for step in plan(model, method, question="", visuals=shown).steps if step.removes]
    except (ValueError, TypeError, VtrError):
        return method  # reported where it is checked
    inside = bool(removing) and removing[0].step.stage == "prefill"
    return with_settings(method, average_keep=float(method.keep)) if inside else method


def _plans(file: SweepFile, setup: Setup, members: Sequence[Member], budgets: Sequence[Budget]) -> Iterator[Variant]:
    """Yields the variants of a plan; the sweep's budgets are for its last method, unless that names its own."""
    last = members[-1]
    free = method_class(last.method).takes_budget and not any(k in last.settings for k in BUDGETS)
    seeded = any("seed" in settings_of(method_class(m.method)) and "seed" not in m.settings for m in members)
    for budget in [*budgets] if free and budgets else [None]:
        for seed in file.seeds if seeded else [None]:
            made: list[Method] = []
            for member in members:
                settings = dict(member.settings)
                if seed is not None and "seed" in settings_of(method_class(member.method)):
                    settings.setdefault("seed", seed)
                if member is last and budget is not None:
                    settings |= {k: getattr(budget, k) for k in BUDGETS if getattr(budget, k) is not None}
                method = create_method(member.method, **settings)
                made.append((_equalised(file, setup, method) if member is last else method) or method)
            yield tuple(made), seed


def _cell(file: SweepFile, variant: Variant, task: Task) -> Cell:
    return Cell(variant[0], task, variant[1], file.limit, file.max_new_tokens)
