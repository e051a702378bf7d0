"""What is searched: a line for every method and every choice of its settings, each with its budgets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtr.eval.run.cells import Cell, changed_settings, variants
from vtr.eval.run.forecast import forecast, misfits
from vtr.eval.run.setup import Setup, sketch
from vtr.eval.tasks import Task
from vtr.hosts._protocol import host_of
from vtr.planning import make_plan
from vtr.plans import FEWEST
from vtr.registry import list_methods, method_class
from vtr.tune.search import Line
from vtr.types import BUDGETS, Budget, Method
from vtr.types.errors import WrongValue
from vtr.types.naming import FULL
from vtr.types.settings import default_settings

ALL = "all"
SHARES = (0.75, 0.6, 0.5, 0.4, 0.3, 0.22, 0.16, 0.11, 0.08, 0.05)
"""Budgets where nobody gives some: shares of an image's visual tokens."""
DEPTHS = (4, 2)
"""A removal inside the LLM is also tried at this part of its layers: a quarter, a half."""
KNOBS = ("layer", "llm_layer")
"""Settings that may say at which layer of the LLM a method removes."""


@dataclass(frozen=True)
class Candidate:
    """A method with its budget, all its settings and, where it has random choices, its seed."""

    label: str
    method: Method = field(compare=False)
    seed: int | None = None


@dataclass
class Space:
    """Lines, and what `all` stood for and does not fit, with the reason."""

    lines: list[Line[Candidate]]
    left_out: list[str]


def make_space(
    setup: Setup, names: Sequence[str], budgets: Sequence[Budget], settings: Mapping[str, Mapping[str, Any]], task: Task
) -> Space:
    """Returns what is searched.

    Args:
        setup: the model.
        names: of methods; `all` = every one that fits the model.
        budgets: to choose from; none = `SHARES`.
        settings: method -> setting -> a value, or a list of values to try; a value that is itself a list stands in a list.
        task: of the cells.

    Raises:
        ValueError: unknown or unfit methods, settings or values, or nothing to search.
    """
    found = Space([], [])
    wanted = [name for name in list_methods() if name != "none"] if ALL in names else [_known(name) for name in dict.fromkeys(names)]
    for name in settings:
        if name not in wanted:
            raise WrongValue(f"--set: {name!r} is not among the methods that are searched ({', '.join(wanted)}); leave it out")
    budgets = _descending(budgets or _shares(setup, task))
    for name in wanted:
        named = name in names or name in settings
        given = {k: v if isinstance(v, list) else [v] for k, v in settings.get(name, {}).items()}
        grids = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
        found.lines += [line for grid in grids for line in _lines(setup, name, grid, budgets, task, found if not named else None)]
    if not found.lines:
        raise WrongValue(f"--methods: none can be searched on {setup.model}: {'; '.join(found.left_out)}")
    return found


def _known(name: str) -> str:
    if name == FULL:
        raise WrongValue("--methods: full is what losses are measured against, and is always run; leave it out")
    return method_class(name).name


def _shares(setup: Setup, task: Task) -> list[Budget]:
    """Returns the usual budgets, but none that leaves next to nothing of the largest image."""
    made = forecast(setup, Cell(None, task))
    return [Budget(keep_ratio=share) for share in SHARES if made is None or share * made.retained >= FEWEST]


def _descending(budgets: Sequence[Budget]) -> list[Budget]:
    return sorted(budgets, key=lambda budget: -(budget.keep or budget.keep_ratio or 0))


def _lines(
    setup: Setup, name: str, grid: dict[str, Any], budgets: Sequence[Budget], task: Task, tolerant: Space | None
) -> list[Line[Candidate]]:
    """Returns the line of a method with some settings, and the same at other layers of the LLM where it removes there.

    Raises:
        ValueError: it does not fit the model, unless there is a space that takes note of that.
    """
    try:
        made = variants(name, budgets, (0,), grid)
        line = _line(setup, made, task)
    except (ValueError, TypeError) as error:
        if tolerant is None:
            raise
        tolerant.left_out.append(str(error))
        return []
    lines = [line]
    for knob, layer in _layers(setup, line.candidates[0].method, grid):
        try:
            lines.append(_line(setup, variants(name, budgets, (0,), {**grid, knob: layer}), task))
        except (ValueError, TypeError):  # only tried because it might do
            continue
    return lines


def _line(setup: Setup, made: Sequence[tuple[Method | None, int | None]], task: Task) -> Line[Candidate]:
    """Returns a line of methods that fit the model.

    Raises:
        ValueError: one does not.
    """
    cells = [Cell(method, task, seed) for method, seed in made]
    for _, error in misfits(setup, cells):
        raise WrongValue(str(error))
    first = cells[0].methods[0]
    shown = [f"{k}={v}" for k, v in changed_settings(first).items() if k not in BUDGETS]
    return Line(" ".join([first.name, *shown]), [Candidate(cell.label, cell.methods[0], cell.seed) for cell in cells])


def _layers(setup: Setup, method: Method, grid: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Returns the setting that says where in the LLM a method removes, with other layers to try; nothing where there is none or it is given."""
    host = host_of(sketch(setup))
    for knob in KNOBS:
        if knob not in default_settings(type(method)) or knob in grid:
            continue
        steps = [item.step for item in make_plan(host, method).steps if item.removes and item.step.stage == "prefill"]
        own = getattr(method, knob)
        if len(steps) == 1 and own in (steps[0].layer, None):
            return [(knob, host.llm_layers // part) for part in DEPTHS if host.llm_layers // part not in (0, steps[0].layer)]
    return []
