"""What is written behind `--model_args`: which settings belong to the method, and errors before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vtr.registry import create_method, method_class
from vtr.types import Method
from vtr.types.errors import WrongValue
from vtr.types.naming import FULL, closest
from vtr.types.settings import setting_value

NAMES = (
    "pretrained",
    "method",
    "device",
    "dtype",
    "attention",
    "max_frames_num",
    "min_pixels",
    "max_pixels",
    "visuals",
    "frame_scores",
    "max_new_tokens",
    "batch_size",
    "max_batch_size",
)


def read_method(name: str, settings: Mapping[str, Any]) -> Method | None:
    """Returns the method with its settings, None for `full`.

    Args:
        name: registry name or `full`.
        settings: arguments that are none of `NAMES`; text is JSON where it can be.

    Raises:
        ValueError, TypeError: unknown method or setting with the closest names, or a value that is out of range.
    """
    name = str(name)
    known = [*NAMES, *([] if name == FULL else [f.name for f in fields(method_class(name))])]
    for setting in settings:
        if setting not in known:
            raise WrongValue(f"vtr: unknown entry {setting!r} in model_args for method {name!r}{closest(setting, known)}")
    return (
        None
        if name == FULL
        else create_method(name, **{key: setting_value(value) if isinstance(value, str) else value for key, value in settings.items()})
    )


def read_count(name: str, value: Any) -> int:
    """Reads a number from 1 on.

    Raises:
        ValueError: anything else, `auto` too.
    """
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1 or isinstance(value, float):
        raise WrongValue(f"vtr: {name} must be a whole number from 1 on, got {value!r}")
    return count
