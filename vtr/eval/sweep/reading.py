"""Reading a sweep: every mistake in its YAML at once, with line and place and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from vtr.eval.sweep.schema import SweepFile, keys_at
from vtr.types.errors import WrongValue
from vtr.types.naming import closest

Place = tuple[str | int, ...]
_RULES = {
    "string_type": "must be text; put it in quotes if it is",
    "int_type": "must be an integer without quotes",
    "int_from_float": "must be an integer",
    "float_type": "must be a number without quotes",
    "bool_type": "must be true or false",
    "list_type": "must be a list, for example [a, b]",
    "dict_type": "must be a mapping, for example {{key: value}}",
    "model_type": "must be a mapping, for example {{key: value}}",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
}
_EXAMPLES = {"models": "models: [tiny-llava]", "tasks": "tasks: [shapes]"}


class Mistake(NamedTuple):
    """What is wrong at a place of the file, e.g. `("methods", 2)`."""

    place: Place
    text: str


class SweepError(WrongValue):
    """Everything that is wrong with a sweep, one line each."""

    def __init__(self, path: str | Path, mistakes: Sequence[Mistake], lines: Mapping[Place, int] | None = None) -> None:
        found = [f"{_where(m.place, lines or {})}{m.text}" for m in mistakes]
        many = f"{len(found)} mistakes" if len(found) > 1 else "1 mistake"
        super().__init__(f"sweep {path}: {many}; nothing was run\n" + "\n".join(f"  {line}" for line in found))
        self.mistakes = list(mistakes)


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[SweepFile, list[Mistake], dict[Place, int]]:
    """Reads a sweep file, with changes from the command line.

    Args:
        path: of the YAML.
        overrides: `key=value` with dots for depth and YAML values, e.g. `limit=5`, `budgets.keep=[64]`, `models.0.dtype=float16`.

    Returns:
        The sweep, the mistakes in it (what is wrong is left out of the sweep, so that the rest can be checked further), and the line of each place.

    Raises:
        ValueError: no such file, or an override that is not `key=value`.
        SweepError: not YAML, or so wrong that nothing is left to check.
    """
    path = Path(path)
    if not path.is_file():
        raise WrongValue(f"sweep: no file {str(path)!r}; eval/sweeps and eval/ablations have examples")
    mistakes: list[Mistake] = []
    try:
        text = path.read_text(encoding="utf-8")
        node, content = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        lines = dict(_lines(node, (), mistakes)) if node else {}
    except RecursionError:
        raise SweepError(path, [Mistake((), "goes too deep, or has an alias (*name) inside what it stands for; write it out")]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(path, [Mistake((), f"not a YAML file ({' '.join(str(error).split())})")]) from None
    if not isinstance(content, dict):
        raise SweepError(path, [Mistake((), f"must be a mapping with models, methods and tasks, got {type(content).__name__}")])
    for override in overrides:
        _override(content, override)
    content = _with_text_keys(content)
    while True:
        try:
            return SweepFile.model_validate(content), mistakes, lines
        except ValidationError as error:
            found = [(tuple(e["loc"]), e["type"], _say(e, content)) for e in error.errors()]
        known = [mistake.place for mistake in mistakes]
        for place, kind, text in found:
            if kind not in ("missing", "too_short") or all(
                one[: len(place)] != place for one in known
            ):  # else it is what an earlier one left
                mistakes.append(Mistake(place, text))
        for place, kind, _ in reversed(found):
            if kind == "missing" and len(place) == 1:
                content[place[0]] = []
            elif not _prune(content, place):
                raise SweepError(path, mistakes, lines)


def _with_text_keys(content: Any) -> Any:
    """Returns a mapping without the keys that `_lines` has named."""
    if isinstance(content, dict):
        return {key: _with_text_keys(value) for key, value in content.items() if isinstance(key, str)}
    return [_with_text_keys(value) for value in content] if isinstance(content, list) else content


def _say(error: Any, content: Any) -> str:
    """Returns our words for an error of pydantic."""
    kind, name, got = error["type"], str(error["loc"][-1]) if error["loc"] else "", error.get("input")
    if kind == "extra_forbidden":
        known = sorted(keys_at(error["loc"][:-1]))
        return f"unknown key {name!r}{closest(name, known)}; keys: {', '.join(known)}"
    if kind == "missing":
        return f"{name!r} is missing; write for example `{_EXAMPLES.get(name, f'{name}: ...')}`"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "too_short":
        return f"a plan has at least two methods, got {len(got)}; a single one belongs under methods"
    rule = _RULES.get(kind)
    if rule:
        return f"{rule.format(**error.get('ctx', {}))}, got {got!r}"
    return f"{error['msg']}, got {got!r}"


def _prune(content: Any, place: Place) -> bool:
    """Takes the part at a place out; whether there was one."""
    parents: list[Any] = [content]
    for part in place:
        inside = parents[-1]
        there = part in inside if isinstance(inside, dict) else isinstance(inside, list) and isinstance(part, int) and part < len(inside)
        if not there:
            break
        parents.append(inside[part])
    if len(parents) == 1:
        return False
    last: Any = place[len(parents) - 2]
    del parents[-2][last]
    return True


def _override(content: dict[str, Any], text: str) -> None:
    key, mark, value = text.partition("=")
    if not mark or not key.strip():
        raise WrongValue(f"override: must look like key=value, got {text!r}; for example limit=5 or budgets.keep=[64]")
    inside: Any = content
    *path, last = [int(part) if part.isdigit() else part for part in key.strip().split(".")]
    try:
        for part in path:
            inside = inside.setdefault(part, {}) if isinstance(inside, dict) else inside[part]
        inside[last] = yaml.safe_load(value)
    except (TypeError, IndexError, AttributeError):
        raise WrongValue(f"override: there is no {key!r} in this sweep, got {text!r}") from None
    except yaml.YAMLError:
        raise WrongValue(f"override: the value of {key!r} must be YAML, got {value!r}") from None


def _lines(node: Any, place: Place, mistakes: list[Mistake]) -> Iterator[tuple[Place, int]]:
    """Yields the line of every place of a YAML document; keys given twice, or that are no text, become mistakes."""
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                mistakes.append(Mistake((*place, key.value), "is given twice; the first would be ignored"))
            seen.add(key.value)
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                mistakes.append(Mistake((*place, key.value), f"a key must be text, got {key.value}; put it in quotes if it is meant"))
            yield from (
                (p, key.start_mark.line + 1 if p == (*place, key.value) else n) for p, n in _lines(value, (*place, key.value), mistakes)
            )
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, (*place, number), mistakes)


def _where(place: Place, lines: Mapping[Place, int]) -> str:
    """Returns a place of the file in words: `line 7, methods[2]: `."""
    if not place:
        return ""
    known = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in lines), None)
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return f"line {lines[known]}, {shown}: " if known else f"{shown}: "
