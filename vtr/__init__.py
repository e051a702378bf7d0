"""vtr: visual token reduction for pretrained multimodal models and dense ViTs, without training.

with vtr.reduced(model, "fastv", keep=64) as reduction:
    out = model.generate(**inputs)
reduction.report()

Importing this package imports nothing else, not even torch: the names below are loaded when the first of them is used. So the command
(`vtr/__main__.py`) can say what Ctrl-C does before the seconds that torch takes, and a program that only imports vtr is left alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtr.methods._score import ScoreMethod
    from vtr.reduction import Reduction, apply, reduced, remove
    from vtr.registry import create_method, list_methods, register_host, register_method
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
        Resize,
        Restore,
        Selection,
        Signal,
        Step,
        Text,
        Tower,
        View,
        VtrError,
    )

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "Budget",
    "Card",
    "Freeze",
    "Geometry",
    "Input",
    "Layer",
    "Merge",
    "Method",
    "Observe",
    "PerToken",
    "Reduction",
    "Remove",
    "Resize",
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
    "list_methods",
    "reduced",
    "register_host",
    "register_method",
    "remove",
]

_SOURCES = ("vtr.types", "vtr.registry", "vtr.methods._score", "vtr.reduction")


def __getattr__(name: str) -> Any:
    """Returns a public name, or one of the modules that hold them; called while `name` is not in this module yet."""
    if f"vtr.{name}" in _SOURCES and name not in __all__:
        return importlib.import_module(f"vtr.{name}")
    if name in __all__:
        source = next(source for source in map(importlib.import_module, _SOURCES) if hasattr(source, name))
        return globals().setdefault(name, getattr(source, name))
    raise AttributeError(f"module 'vtr' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names, loaded or not."""
    return sorted({*globals(), *__all__})
