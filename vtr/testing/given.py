"""Reducing a model with what a method needs of its caller, beside the model."""

from __future__ import annotations

from typing import Any

from vtr import reduction
from vtr.types import Method


def scores(frames: list[int]) -> list[list[float]]:
    """Returns scores of the frames of videos: the middle ones most."""
    return [[1 / (1 + abs(2 * i + 1 - count)) for i in range(count)] for count in frames]


def beside(method: Any) -> dict[str, Any]:
    """Returns the arguments of `vtr.reduced` without which a method refuses."""
    return {"frame_scores": scores} if isinstance(method, Method) and method.card.needs_frame_scores else {}


def reduced(model: Any, method: Any) -> reduction.Reduction:
    """Returns `vtr.reduced` of a model and a method, or what watches one."""
    return reduction.reduced(model, method, **beside(method))


def apply(model: Any, method: Any) -> reduction.Reduction:
    """Returns `vtr.apply` of a model and a method."""
    return reduction.apply(model, method, **beside(method))
