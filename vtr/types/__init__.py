"""What methods, hosts and the engine share. Nothing here imports anything else of ours, and there is no logic beyond validation."""

from vtr.types.budget import Budget
from vtr.types.errors import VtrError
from vtr.types.geometry import Geometry, check_llm_layer
from vtr.types.method import BUDGETS, Card, Method
from vtr.types.naming import steps_of_method
from vtr.types.selection import Selection
from vtr.types.settings import at_least, check_choices, is_integer, is_number, plain
from vtr.types.signals import PerToken, Signal, SignalKind, TextEmbedding
from vtr.types.step import (
    ACTIONS,
    STAGES,
    VIDEO,
    Action,
    Attend,
    Boundary,
    Decode,
    FrameOption,
    Freeze,
    Input,
    Layer,
    Merge,
    NewlineOption,
    Observe,
    Place,
    PositionOption,
    Remove,
    Rescale,
    Restore,
    Stage,
    Step,
    Tower,
)
from vtr.types.view import Grid, Kind, Text, View, with_named_signals

__all__ = [
    "ACTIONS",
    "BUDGETS",
    "STAGES",
    "VIDEO",
    "Action",
    "Attend",
    "Boundary",
    "Budget",
    "Card",
    "Decode",
    "FrameOption",
    "Freeze",
    "Geometry",
    "Grid",
    "Input",
    "Kind",
    "Layer",
    "Merge",
    "Method",
    "NewlineOption",
    "Observe",
    "PerToken",
    "Place",
    "PositionOption",
    "Remove",
    "Rescale",
    "Restore",
    "Selection",
    "Signal",
    "SignalKind",
    "Stage",
    "Step",
    "Text",
    "TextEmbedding",
    "Tower",
    "View",
    "VtrError",
    "at_least",
    "check_choices",
    "check_llm_layer",
    "is_integer",
    "is_number",
    "plain",
    "steps_of_method",
    "with_named_signals",
]
