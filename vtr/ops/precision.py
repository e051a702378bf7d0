"""Computing in the precision that was asked for, also inside `torch.autocast`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def outside_autocast(function: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator: autocast, which turns products of float32 tensors to half precision, is off while `function` runs.

    The device is that of the first argument, a tensor or something with `tokens`.
    """

    @wraps(function)
    def run(first: Any, *args: Any, **kwargs: Any) -> Made:
        kind = getattr(first, "tokens", first).device.type
        if not torch.is_autocast_enabled(kind):
            return function(first, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(first, *args, **kwargs)

    return run


def widened(values: Tensor) -> Tensor:
    """Returns values in float32, or as they are where they are wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
