"""Rows of a batch a few at a time, where that is what a processor's cache wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
CACHE = 4 << 20
"""Bytes of inputs that are worked on at a time."""
_WHOLE: ContextVar[bool] = ContextVar("vtr_whole", default=False)


@contextmanager
def all_at_once() -> Iterator[None]:
    """For a block and this thread a CPU gets all rows at once, too: the launches are those of a GPU."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def suits_cpu(tensor: Tensor) -> bool:
    """Whether work on a tensor goes the way that is fast on a CPU, whatever the number of launches."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _WHOLE.get()


def in_blocks(run: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator: on a CPU a function of rows gets so many of them at a time as fit in its cache, everywhere else all of them.

    What passes over its rows again and again (a greedy choice, a product and what follows) would fetch all of them from memory in every pass.
    A GPU has the bandwidth and wants few launches.

    Args:
        run: takes tensors `(G, ...)`, the first of its arguments among them, and settings that are no tensors; returns such tensors, one or a
            tuple of them. What it returns for a row depends on that row alone.
    """

    @wraps(run)
    def blocks(*given: Any, **named: Any) -> Made:
        rows = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
        groups = len(rows[0])
        size = max(1, CACHE * groups // max(1, sum(value.numel() * value.element_size() for value in rows)))
        if 2 * size > groups or not suits_cpu(rows[0]):
            return run(*given, **named)
        size = -(-groups // -(-groups // size))  # as many blocks, all alike
        parts = [
            run(*(_part(value, start, size) for value in given), **{name: _part(value, start, size) for name, value in named.items()})
            for start in range(0, groups, size)
        ]
        return _joined(parts)

    return blocks


def _part(value: Any, start: int, size: int) -> Any:
    return value[start : start + size] if isinstance(value, Tensor) else value


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return type(parts[0])(*columns) if hasattr(parts[0], "_fields") else tuple(columns)
