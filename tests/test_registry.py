"""Finding methods and hosts: every thread sees all of them, a failed import is tried again, and what is registered wrong is said in one line."""

import importlib
import sys
import threading
import time
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint

import numpy as np
import pytest

import vtr
from vtr import registry
from vtr.types import Boundary, Freeze, Input, Layer, Merge, Observe, Remove, Rescale, Restore, Selection, Signal, Step, Tower
from vtr.types.signals import attention

COUNT = len(vtr.list_methods())


@pytest.fixture
def unloaded(monkeypatch):
    """As if nothing had been loaded; what is imported stays, the tables are filled again with what they had."""
    monkeypatch.setattr(registry, "_LOADED", set())
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    return monkeypatch


def points(*found):
    return lambda group: [EntryPoint(name, value, group) for name, value in found] if group == "vtr.methods" else []


def test_a_second_thread_waits_until_every_method_is_there(unloaded):
    names, real = dict(registry._METHODS), importlib.import_module
    registry._METHODS.clear()

    def slow(name, package=None):
        if name.startswith("vtr.methods."):
            time.sleep(0.01)
            registry._METHODS.update({k: v for k, v in names.items() if v.__module__ == name})
        return real(name, package)

    unloaded.setattr(registry.importlib, "import_module", slow)
    counts = []
    threads = [threading.Thread(target=lambda: counts.append(len(vtr.list_methods()))) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert counts == 4 * [len([v for v in names.values() if v.__module__.startswith("vtr.methods.")])]


def test_a_failed_import_raises_again_next_time(unloaded):
    real = importlib.import_module

    def broken(name, package=None):
        if name == "vtr.methods.fastv":
            raise ImportError("no module named 'gone'")
        return real(name, package)

    with unloaded.context() as patch:
        patch.setattr(registry.importlib, "import_module", broken)
        for _ in range(2):
            with pytest.raises(ImportError, match="no module named 'gone'"):
                vtr.list_methods()
    assert len(vtr.list_methods()) == COUNT


def test_a_module_may_ask_for_methods_while_it_is_imported(unloaded):
    real = importlib.import_module

    def asking(name, package=None):
        assert isinstance(vtr.list_methods(), list)
        return real(name, package)

    unloaded.setattr(registry.importlib, "import_module", asking)
    assert len(vtr.list_methods()) == COUNT


MODULE = """
from dataclasses import dataclass
import vtr

@vtr.register_method("rightname")
@dataclass(frozen=True, kw_only=True)
class Method(vtr.Method):
    card = vtr.Card(title="a test", paper="none")
    stages = ("boundary",)
"""


def test_an_entry_point_that_brings_no_method_of_its_name_is_named(unloaded, heard, tmp_path):
    (tmp_path / "their_package.py").write_text(MODULE)
    (tmp_path / "their_broken.py").write_text("import vtr\nraise RuntimeError('two\\nlines')\n")
    unloaded.syspath_prepend(tmp_path)
    unloaded.setattr(
        registry,
        "entry_points",
        points(("wrongname", "their_package"), ("rightname", "their_package"), ("broken", "their_broken"), ("gone", "not_there:x")),
    )
    assert "rightname" in vtr.list_methods()
    vtr.list_methods()
    said = [record.getMessage() for record in heard]
    assert said == [
        "entry point wrongname = their_package of vtr.methods: their_package registers nothing of that name; it has rightname",
        "entry point broken = their_broken of vtr.methods cannot be loaded: RuntimeError: two lines",
        "entry point gone = not_there:x of vtr.methods cannot be loaded: ModuleNotFoundError: No module named 'not_there'",
    ]
    assert all(record.exc_info is None for record in heard)
    del sys.modules["their_package"]


# -- what is registered


CARD = vtr.Card(title="a test", paper="none")


def register(**members):
    cls = type("Theirs", (vtr.Method,), {"__module__": __name__, "card": CARD, "stages": ("boundary",), **members})
    return vtr.register_method("theirs")(dataclass(frozen=True, kw_only=True)(cls))


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ({"stages": ("boundry",)}, ValueError, "register_method: 'theirs' has an unknown stage 'boundry'; did you mean 'boundary'"),
        ({"stages": "boundary"}, TypeError, r"register_method: 'theirs' needs a tuple as its stages, got 'boundary'; write stages = "),
        ({"card": "a test"}, TypeError, r"register_method: 'theirs' needs a vtr\.Card as its card, got 'a test'"),
    ],
)
def test_a_card_and_stages_make_sense(members, error, message, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {})
    with pytest.raises(error, match=message):
        register(**members)
    assert not registry._METHODS


def test_a_method_is_a_frozen_dataclass(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {})

    class Forgotten(vtr.Method):
        tau: float = 0.5
        card, stages = CARD, ("boundary",)

    with pytest.raises(
        TypeError, match=r"'forgotten' must decorate a frozen dataclass, got .*write @dataclass\(frozen=True, kw_only=True\)"
    ):
        vtr.register_method("forgotten")(Forgotten)


def test_what_a_method_does_not_say_is_said(monkeypatch, heard):
    monkeypatch.setattr(registry, "_METHODS", {})
    register(card=vtr.Method.card, stages=())
    assert [r.getMessage() for r in heard] == [
        "method theirs has no stages and no card, so vtr list cannot say what it does; see vtr.Card and vtr.Method"
    ]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Signal("cls_rows"), ValueError, "Signal: unknown kind 'cls_rows'; did you mean 'cls_row', .*; kinds: cls_row, cls_v"),
        (lambda: Signal("rows", layer="2"), TypeError, "Signal: layer must be an integer or None, got '2'"),
        (lambda: Signal("rows", queries="first"), ValueError, "Signal: queries must be 'last', 'text' or 'visual', got 'first'"),
        (lambda: Remove(Boundary(), len, per="views"), ValueError, "Remove: per must be 'image' or 'view', got 'views'"),
        (lambda: Layer(2.0), TypeError, r"Layer: layer must be an integer, got 2\.0"),
        (lambda: Tower(2, at="norm"), ValueError, "Tower: at must be 'layer' or 'mlp', got 'norm'"),
        (lambda: Remove("boundary", len), TypeError, r"Remove: where must be Tower\(\.\.\.\) or .* or Layer\(\.\.\.\), got 'boundary'"),
        (lambda: Restore(Boundary()), TypeError, r"Restore: where must be Tower\(\.\.\.\), got Boundary"),
        (lambda: Freeze(Tower(2)), TypeError, r"Freeze: where must be Layer\(\.\.\.\), got Tower"),
        (lambda: Observe(Input(), len), TypeError, r"Observe: where must be .*, got Input\(\)"),
        (lambda: Rescale(Boundary(), len), TypeError, r"Rescale: where must be Input\(\.\.\.\), got Boundary"),
        (lambda: Merge(Layer(2), None), TypeError, "Merge: needs a select function of a View, got None"),
        (
            lambda: Remove(Layer(2), len, attention(1)),
            TypeError,
            r"Remove: needs must be a tuple of signals, got Signal.*; write needs=\(signal,\)",
        ),
        (lambda: Step(Boundary(), len), TypeError, "Step: is what all steps have in common, .* write Remove, Merge, Observe"),
        (lambda: Selection(keep=True, order="patch"), ValueError, "Selection: order must be 'position' or 'given', got 'patch'"),
    ],
)
def test_typing_mistakes_in_steps_and_signals_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_layers_of_numpy_are_integers():
    step = Remove(Layer(np.int64(2)), len, (attention(np.int64(1)),))
    assert type(step.layer) is type(step.needs[0].layer) is int and replace(step, where=Layer(3)).layer == 3
