"""What of a parameter belongs to the quick suite."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick_first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """The first values as they are, the others marked slow; a tuple holds the arguments of several parameters."""
    every = list(values)
    return [*every[:count], *(slow(value) for value in every[count:])]


def quick_only(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """Those that are in `quick` as they are, the others marked slow."""
    return [value if value in quick else slow(value) for value in values]


def slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
