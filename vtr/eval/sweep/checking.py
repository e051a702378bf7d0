"""What pydantic cannot know of a sweep: settings that methods have not, what is said twice, and what contradicts another key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from vtr.eval.sweep.reading import Mistake, Place
from vtr.eval.sweep.schema import ALL, Budgets, SweepFile
from vtr.models.loading import check_device
from vtr.registry import create_method, list_methods, method_class
from vtr.types import BUDGETS, Method
from vtr.types.errors import WrongType
from vtr.types.naming import FULL, closest
from vtr.types.settings import default_settings


def find_mistakes(file: SweepFile, earlier: Sequence[Mistake]) -> list[Mistake]:
    """Returns everything that is wrong with the file by itself; wrong settings are taken out of it.

    Args:
        file: from `read_sweep`.
        earlier: the mistakes that it has named.
    """
    return [*_repeated(file), *_contradictions(file), *_setting_mistakes(file, any(m.place[:1] == ("methods",) for m in earlier))]


def without_moved(mistakes: Sequence[Mistake], earlier: Sequence[Mistake]) -> list[Mistake]:
    """Mistakes with the whole list as their place where earlier ones were taken out of it, so that its numbers are no longer those of the file."""
    found = []
    for place, text in mistakes:
        at = next((n for n, part in enumerate(place) if isinstance(part, int)), len(place))
        moved = any(len(one.place) > at and one.place[:at] == place[:at] for one in earlier)
        found.append(Mistake(place[:at] if moved else place, text))
    return found


def absent_devices(file: SweepFile) -> list[Mistake]:
    """Returns the devices of the sweep that this machine does not have."""
    found = []
    entries = [(("models", number, "device"), entry.device) for number, entry in enumerate(file.models)]
    for place, device in [(("device",), file.device), *entries]:
        try:
            check_device(device)
        except ValueError as error:
            found.append(Mistake(place, str(error).removeprefix("device: ")))
    return found


def _repeated(file: SweepFile) -> Iterator[Mistake]:
    """Yields values that occur twice in a list, which would make two equal cells."""
    for place, values in _lists(file):
        for number, value in enumerate(values):
            if (text := str(value)) in map(str, values[:number]):
                yield Mistake((*place, number), f"{text} is given twice; leave one out")


def _lists(file: SweepFile) -> Iterator[tuple[Place, Sequence[Any]]]:
    """Yields every list of the file in which each value is another experiment."""
    yield ("models",), [entry.model_dump(exclude_none=True) if entry.model_fields_set - {"model"} else entry.model for entry in file.models]
    plans = [[" ".join([one.method, *(f"{k}={v}" for k, v in one.settings.items())]) for one in plan] for plan in file.plans]
    yield ("plans",), [" + ".join(plan) for plan in plans]
    for name in ("methods", "tasks", "seeds"):
        yield (name,), getattr(file, name)
    for prefix, budgets, seeds in (((), file.budgets, []), *((("models", n), e.budgets, e.seeds or []) for n, e in enumerate(file.models))):
        yield (*prefix, "seeds"), seeds
        if isinstance(budgets, Budgets):
            yield from (((*prefix, "budgets", kind), getattr(budgets, kind)) for kind in BUDGETS)
    yield from ((("models", n, "methods"), entry.methods) for n, entry in enumerate(file.models) if entry.methods)
    for method, grids in file.settings.items():
        yield from ((("settings", method, setting), values) for grid in grids for setting, values in grid.items())


def _contradictions(file: SweepFile) -> Iterator[Mistake]:
    """Yields settings that would silently win over `budgets` or `seeds`."""
    budgets = file.budgets or any(entry.budgets for entry in file.models)
    seeds = {*file.seeds, *(seed for entry in file.models for seed in entry.seeds or [])}
    said = "seeds" in file.model_fields_set or any(entry.seeds is not None for entry in file.models)
    for method, grids in file.settings.items():
        for setting, value in ((setting, value) for grid in grids for setting, values in grid.items() for value in values):
            place = ("settings", method, setting)
            if setting in BUDGETS and budgets and value is not None:
                way = "write the value there, or leave `budgets` out and give every method its own under settings"
                yield Mistake(place, f"{setting} is a budget and the sweep has `budgets`, got {setting}={value!r}; {way}")
            if setting == "seed" and said and value not in seeds:
                yield Mistake(place, f"seed must be one of `seeds` ({', '.join(map(str, sorted(seeds)))}), got {value!r}; write it there")


def _setting_mistakes(file: SweepFile, unsure: bool) -> list[Mistake]:
    """Settings one by one, so that all wrong ones are found; they are taken out of the file. `unsure`: methods may be missing by a mistake."""
    found = []
    named = names_of(file)
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
                having = [cls for cls in classes if setting in settings_of(cls)]
                if not having:
                    known = sorted({s for cls in classes for s in settings_of(cls)})
                    text = f"unknown setting {setting!r} of {name}{closest(setting, known)}; settings: {', '.join(known)}"
                    found.append(Mistake(("settings", name, setting), text))
                    del grid[setting]
                for value in values if having else []:
                    problem = next(filter(None, (_problem(cls, setting, value) for cls in having)), None)
                    if problem:
                        found.append(Mistake(("settings", name, setting), problem))
                        grid[setting] = [v for v in grid[setting] if v is not value]
                if setting in grid and not grid[setting]:
                    del grid[setting]  # the others are tried without it
    return found


def _problem(cls: type[Method], setting: str, value: Any) -> str | None:
    try:
        create_method(cls.name, **{setting: value})
    except ValueError as error:
        return str(error)
    except WrongType as error:
        return (
            f"{cls.name}: {setting} cannot be {value!r}; its default is {default_settings(cls)[setting]!r}"
            if error.__cause__
            else str(error)
        )
    return None


def settings_of(cls: type[Method]) -> list[str]:
    """Returns the settings of a method, those of the budget only where it has one."""
    names = [f.name for f in fields(cls)]
    return [n for n in names if n not in BUDGETS] if not cls.takes_budget else names


def names_of(file: SweepFile) -> list[str]:
    """Returns the methods in the order of the file, `all` spelled out."""
    every = [FULL, *list_methods()]
    return list(dict.fromkeys(n for name in file.methods for n in (every if name == ALL else [name])))
