"""What methods, hosts and the engine share. Nothing here imports anything else of ours, and there is no logic beyond validation."""

from vtr.types.budget import Budget
from vtr.types.contract import (
    ACTIONS,
    STAGES,
    Action,
    Geometry,
    NewlineOption,
    PerToken,
    PositionOption,
    Selection,
    Signal,
    SignalKind,
    Stage,
    Step,
    Text,
    TextEmbedding,
    View,
    VtrError,
)
from vtr.types.method import BUDGETS, Card, Method
from vtr.types.settings import check_choices, is_integer, is_number, plain

__all__ = [
    "ACTIONS",
    "BUDGETS",
    "STAGES",
    "Action",
    "Budget",
    "Card",
    "Geometry",
    "Method",
    "NewlineOption",
    "PerToken",
    "PositionOption",
    "Selection",
    "Signal",
    "SignalKind",
    "Stage",
    "Step",
    "Text",
    "TextEmbedding",
    "View",
    "VtrError",
    "check_choices",
    "is_integer",
    "is_number",
    "plain",
]
