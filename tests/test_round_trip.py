"""A method, and a plan of several, as a dict with names: through JSON and YAML and back."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

import vtr
from vtr import registry
from vtr.types.settings import default_settings

NAMES = vtr.list_methods()
TEXTS = {
    "itself": lambda content: content,
    "JSON": lambda content: json.loads(json.dumps(content)),
    "YAML": lambda content: yaml.safe_load(yaml.safe_dump(content)),
}


def made(name: str) -> vtr.Method:
    """The method at its default settings; ShortV has no layers for the models of the tests."""
    return vtr.create_method(name, **({"layers": (1, 2)} if name == "shortv" else {}))


def other_values(annotation: Any, value: Any) -> Iterator[Any]:
    """Some other values that a setting may have, by its annotation and its default."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for kind in get_args(annotation):
            yield from other_values(kind, None)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (value + 1, value / 2, value * 2)
    elif isinstance(value, tuple) and value and all(isinstance(entry, int) for entry in value):
        yield (*value, value[-1] + 1)
    yield from (3, 0.25, (2, 3))


def changed(method: vtr.Method) -> Iterator[vtr.Method]:
    """The method with every setting changed in turn, in every way that it accepts."""
    hints = get_type_hints(type(method))
    for field in fields(method):
        for value in other_values(hints[field.name], getattr(method, field.name)):
            try:
                one = replace(method, **{field.name: value})
            except (TypeError, ValueError):
                continue
            if one != method:
                yield one


@pytest.mark.parametrize("name", NAMES)
def test_every_method_survives_with_default_and_with_changed_settings(name: str) -> None:
    method = made(name)
    methods = [method, *changed(method)]
    assert len(methods) > 1
    for one in methods:
        content = one.to_dict()
        assert content == json.loads(json.dumps({"name": name, **asdict(one)}, default=str)), "as results hold it"
        for text in TEXTS.values():
            again = vtr.method_from(text(content))
            assert again == one and type(again) is type(one)


def test_settings_that_are_left_out_are_the_default() -> None:
    assert vtr.method_from({"name": "fastv"}) == vtr.create_method("fastv")
    assert vtr.method_from({"name": "fastv", "keep": 64}) == vtr.create_method("fastv", keep=64)


def test_a_method_of_somebody_else_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @vtr.register_method("theirs")
    @dataclass(frozen=True, kw_only=True)
    class Theirs(vtr.Method):
        radius: float = 0.5
        layers: tuple[int, ...] = (1, 2)
        rule: Literal["mean", "max"] = "mean"

        stages: ClassVar[tuple[Any, ...]] = ("boundary",)
        default_budget: ClassVar[vtr.Budget | None] = vtr.Budget(keep_ratio=0.5)
        card: ClassVar[vtr.Card] = vtr.Card(title="Theirs", paper="none")

        def __post_init__(self) -> None:
            super().__post_init__()
            object.__setattr__(self, "layers", tuple(self.layers))

    for method in (Theirs(), Theirs(keep=9, radius=1.5, layers=(3,), rule="max", position_ids="renumber")):
        for text in TEXTS.values():
            assert vtr.method_from(text(method.to_dict())) == method
    assert Theirs(keep=9).to_dict() == {
        "name": "theirs",
        **default_settings(Theirs),
        "position_ids": None,
        "frames": None,
        "keep": 9,
        "layers": [1, 2],
    }


@pytest.mark.parametrize("content", [None, "fastv", ["fastv"], {"keep": 64}, {"name": 3}])
def test_what_names_no_method_is_refused(content: Any) -> None:
    with pytest.raises(TypeError, match=r"method_from: content must map 'name' to the name of a method, beside its settings, got "):
        vtr.method_from(content)


def test_mistakes_in_a_file_have_the_words_of_create_method() -> None:
    with pytest.raises(ValueError, match=r"fastv: unknown setting 'kep'; did you mean 'keep'"):
        vtr.method_from({"name": "fastv", "kep": 64})
