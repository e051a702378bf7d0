"""vtr: visual token reduction for pretrained multimodal models and dense ViTs, without training.

with vtr.reduced(model, "fastv", keep=64) as reduction:
    out = model.generate(**inputs)
reduction.report()
"""

import os
import signal
import sys
from pathlib import Path

if Path((sys.argv or [""])[0]).stem in ("vtr", "-m"):  # the command: Ctrl-C while torch is being imported ends it without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until vtr.cli.main takes over

from vtr.apply import Reduction, apply, reduced, remove
from vtr.registry import create_method, list_methods, register_host, register_method
from vtr.types import Budget, Card, Geometry, Method, PerToken, Selection, Signal, Step, Text, View, VtrError

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Card",
    "Geometry",
    "Method",
    "PerToken",
    "Reduction",
    "Selection",
    "Signal",
    "Step",
    "Text",
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
