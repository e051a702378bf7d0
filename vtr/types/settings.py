"""Settings as plain Python values that fit their annotations."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from vtr.types.errors import WrongType, WrongValue

_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "text", NoneType: "None"}


def plain(value: Any) -> Any:
    """Returns a number of numpy or torch as Python's own, so that settings survive JSON; lists and tuples likewise, other values as they are.

    Arrays and tensors without dimensions are numbers; a tensor on a GPU is waited for. Paths become text.
    """
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if not isinstance(value, (bool, int, float, str)) and hasattr(value, "__index__") and not hasattr(value, "ndim"):
        return int(value.__index__())
    return value


@cache
def _stays(kind: Any) -> bool:
    """Whether `plain` returns every value of a type as it is."""
    return not (kind in (list, tuple) or issubclass(kind, os.PathLike) or hasattr(kind, "ndim") or hasattr(kind, "__index__"))


def setting_value(text: str) -> Any:
    """Returns a setting that was written as text, on a command line for example: JSON or `True`, `False`, `None` where it is that, else the text."""
    named = {"True": True, "False": False, "None": None}
    if text in named:
        return named[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def default_settings(cls: Any) -> dict[str, Any]:
    """Returns setting name -> default of a method class, in order; None for a setting without a default, positions as they are published.

    `frames` is what a method for images sees of a video unless told, and None of a method for videos.
    """
    found = {
        f.name: f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None
        for f in fields(cls)
    }
    frames = {} if cls.card.needs_video else {"frames": found["frames"] or cls.frames_unless_told}
    return {**found, "position_ids": found["position_ids"] or cls.published_positions, **frames}


def is_integer(value: Any) -> bool:
    """Whether a value is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_types(settings: object, who: str, skip: tuple[str, ...] = ()) -> None:
    """Makes the fields of a frozen dataclass plain, and refuses values of another type than annotated.

    Only int, float, bool, str, Literal, None and unions of these are checked; a field with any other annotation is left to its class.

    Args:
        settings: an instance.
        who: what messages begin with.
        skip: fields that are checked elsewhere.

    Raises:
        TypeError: a value of the wrong type.
    """
    for name, kinds, fitting, _ in _annotations(type(settings)):  # type: ignore[arg-type]
        value = getattr(settings, name)
        if type(value) in fitting or (not kinds and _stays(type(value))):  # type: ignore[arg-type]
            continue
        if (own := plain(value)) is not value:
            object.__setattr__(settings, name, own)
        if name not in skip and kinds and not any(_is_of(own, kind) for kind in kinds):
            raise WrongType(f"{who}: {name} must be {_any_of(kinds)}, got {value!r}")


def check_choices(settings: object, who: str) -> None:
    """Refuses values of fields annotated as Literal that are none of its values.

    Raises:
        ValueError: any other value.
    """
    for name, kinds, _, literals in _annotations(type(settings)):  # type: ignore[arg-type]
        if not literals:
            continue
        value = getattr(settings, name)
        if any(_is_one(value, kind) for kind in literals) or any(_is_of(value, kind) for kind in kinds if kind not in literals):
            continue
        raise WrongValue(f"{who}: {name} must be {_any_of(kinds)}, got {value!r}")


def at_least(settings: Any, name: str, least: int, hint: str = "") -> None:
    """Refuses a setting below the least that means something; None passes.

    Args:
        settings: an instance with its name in `settings.name`.
        name: of the field.
        least: the smallest value that is allowed.
        hint: what the message says behind the value.

    Raises:
        ValueError: it is smaller.
    """
    value = getattr(settings, name)
    if value is not None and value < least:
        raise WrongValue(f"{settings.name}: {name} must be at least {least}, got {value}{hint}")


@cache
def _annotations(cls: type) -> tuple[tuple[str, tuple[Any, ...], frozenset[type], tuple[Any, ...]], ...]:
    """Every field: its name; the simple types that it may have, none where its annotation is not simple or names what cannot be found; Python
    types whose values fit without a further look; and the Literals among the simple types."""
    found = {}
    for base in reversed(cls.__mro__):
        names = vars(sys.modules.get(base.__module__, sys))
        for name, annotation in inspect.get_annotations(base).items():
            try:
                found[name] = eval(annotation, dict(names)) if isinstance(annotation, str) else annotation
            except (NameError, AttributeError, TypeError, SyntaxError):  # known only to type checkers
                found[name] = Any
    known = [(field.name, tuple(_members(found.get(field.name, Any)))) for field in fields(cls)]
    simple = [(name, kinds if all(kind in _KINDS or get_origin(kind) is Literal for kind in kinds) else ()) for name, kinds in known]
    return tuple((name, kinds, _fitting(kinds), tuple(kind for kind in kinds if get_origin(kind) is Literal)) for name, kinds in simple)


def _fitting(kinds: tuple[Any, ...]) -> frozenset[type]:
    """Types whose values fit one of `kinds`; of a Literal, those of its choices."""
    parts = [get_args(kind) if get_origin(kind) is Literal else ((kind, int) if kind is float else (kind,)) for kind in kinds]
    return frozenset(part if isinstance(part, type) else type(part) for group in parts for part in group)


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _members(part)
    else:
        yield NoneType if annotation is None else annotation


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:  # only the type; `check_choices` looks at the value, after the class itself did
        return any(type(value) is type(choice) for choice in get_args(kind))
    if kind in (int, float):
        return is_integer(value) if kind is int else is_number(value)
    return isinstance(value, kind)


def _is_one(value: Any, literal: Any) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in get_args(literal))


def _any_of(kinds: tuple[Any, ...]) -> str:
    """`'a', 'b' or None`."""
    named = [word for kind in kinds for word in ([_KINDS[kind]] if kind in _KINDS else map(repr, get_args(kind)))]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + f" or {named[-1]}"
