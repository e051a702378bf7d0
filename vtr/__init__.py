"""vtr: visual token reduction for pretrained multimodal models and dense ViTs, without training.

with vtr.reduced(model, "fastv", keep=64) as reduction:
    out = model.generate(**inputs)
reduction.report()

Importing this package imports nothing else, not even torch: the names below are loaded when the first of them is used. So the command
(`vtr/__main__.py`) can say what Ctrl-C does before the seconds that torch takes, and a program that only imports vtr is left alone.
The classes of the toolkit's methods can be imported from here, too: `from vtr import FastV`.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtr.data.frames import FrameQuestion
    from vtr.eval.frame_scores import FrameScorer
    from vtr.hosts._protocol import host_of
    from vtr.methods._score import ScoreMethod
    from vtr.planning import plan
    from vtr.plans import Plan
    from vtr.reduction import Reduction, apply, reduced, remove
    from vtr.registry import create_method, list_hosts, list_methods, method_from, register_host, register_method
    from vtr.report import Report
    from vtr.saved import load_plan
    from vtr.types import (
        Boundary,
        Budget,
        Card,
        Freeze,
        Geometry,
        Input,
        Layer,
        Merge,
        Method,
        Observe,
        PerToken,
        Remove,
        Rescale,
        Restore,
        Selection,
        Signal,
        Step,
        Text,
        Tower,
        View,
        VtrError,
    )
    from vtr.viz import draw

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "Budget",
    "Card",
    "FrameQuestion",
    "FrameScorer",
    "Freeze",
    "Geometry",
    "Input",
    "Layer",
    "Merge",
    "Method",
    "Observe",
    "PerToken",
    "Plan",
    "Reduction",
    "Remove",
    "Report",
    "Rescale",
    "Restore",
    "ScoreMethod",
    "Selection",
    "Signal",
    "Step",
    "Text",
    "Tower",
    "View",
    "VtrError",
    "apply",
    "create_method",
    "draw",
    "host_of",
    "list_hosts",
    "list_methods",
    "load_plan",
    "method_from",
    "plan",
    "reduced",
    "register_host",
    "register_method",
    "remove",
]

_SOURCES = (
    "vtr.types",
    "vtr.registry",
    "vtr.methods._score",
    "vtr.reduction",
    "vtr.planning",
    "vtr.saved",
    "vtr.viz",
    "vtr.eval.frame_scores",
)


def __getattr__(name: str) -> Any:
    """Returns a public name, a method class, or one of the modules that hold them; called while `name` is not in this module yet."""
    if f"vtr.{name}" in _SOURCES and name not in __all__:
        return importlib.import_module(f"vtr.{name}")
    if name in __all__:
        source = next(source for source in map(importlib.import_module, _SOURCES) if hasattr(source, name))
        return globals().setdefault(name, getattr(source, name))
    if name in _method_classes():
        return globals().setdefault(name, getattr(importlib.import_module(_method_classes()[name]), name))
    raise AttributeError(f"module 'vtr' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names and the method classes, loaded or not."""
    modules = {name for name, value in globals().items() if isinstance(value, ModuleType) and value.__name__.startswith("vtr.")}
    return sorted({*__all__, *_method_classes(), *modules, *(name for name in globals() if name.startswith("__"))})


@cache
def _method_classes() -> dict[str, str]:
    """Returns class name -> module of the methods in `vtr/methods`; reads their sources and imports nothing."""
    found = {}
    for path in sorted((Path(__file__).parent / "methods").glob("[!_]*.py")):
        registered = re.search(r"^@register_method\(.*?^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        if registered:
            found[registered[1]] = f"vtr.methods.{path.stem}"
    return found
