"""Replays reference vectors (`*.safetensors` made by the authors' code) through the toolkit's own public functions.

One file per method, `scripts/replay/<method>.py`, found by scanning the folder, with `def replay(vector: Vector) -> None`. It chooses the
schema by the tensor names, calls functions of `vtr.methods` and `vtr.ops`, and compares with `same_index` and `close`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vtr.registry import method_class

_compared: ContextVar[list[str] | None] = ContextVar("vtr_replay_compared", default=None)


class ReplayError(AssertionError):
    """A vector cannot be replayed or does not agree; the message says why."""


@dataclass(frozen=True)
class Vector:
    """One reference vector.

    Args:
        path: file it was read from.
        method: registry name of the method.
        tensors: name -> tensor, on the CPU.
        params: the metadata, JSON-decoded where that is possible, with the entries of a `params` object merged in.
    """

    path: Path
    method: str
    tensors: dict[str, Tensor] = field(repr=False)
    params: dict[str, Any]

    def has(self, *names: str) -> bool:
        """Tells whether every one of these tensors is in the file."""
        return all(name in self.tensors for name in names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ReplayError(f"{self.method}: no tensor {name!r} in the file; it has {', '.join(sorted(self.tensors))}")
        return self.tensors[name]

    def param(self, name: str, default: Any = ...) -> Any:
        """Returns the parameter `name`; without a default a missing one is a `ReplayError`."""
        if name not in self.params and default is ...:
            raise ReplayError(f"{self.method}: no parameter {name!r} in the metadata; it has {', '.join(sorted(self.params))}")
        return self.params.get(name, default)

    def unknown_schema(self) -> ReplayError:
        """Returns the error for tensor names that no replay function of the method knows."""
        return ReplayError(f"{self.method}: unknown schema with tensors {', '.join(sorted(self.tensors))}")


@dataclass(frozen=True)
class Result:
    """Outcome of one file: `reason` is what went wrong, or what was compared."""

    path: str
    passed: bool
    reason: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'} {self.path}: {self.reason}"


def list_replays() -> list[str]:
    """Returns the methods that have replay functions, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def read_vector(path: str | Path) -> Vector:
    """Reads a vector and finds its method: the metadata key `method`, else the file name up to the first `-`.

    Raises:
        ReplayError: the file is missing or is not a readable safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise ReplayError("no such file" if not path.exists() else "not a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ReplayError(f"not a readable safetensors file ({error})") from error
    params = {key: _decoded(value) for key, value in metadata.items()}
    if isinstance(params.get("params"), Mapping):
        params = {**params, **params["params"]}
    method = _decoded(metadata["method"]) if "method" in metadata else path.name.removesuffix(".safetensors").split("-")[0]
    return Vector(path, _method_name(str(method)), tensors, params)


def replay_file(path: str | Path) -> Result:
    """Replays one file; every failure becomes a `Result`, never an exception."""
    compared: list[str] = []
    token = _compared.set(compared)
    try:
        vector = read_vector(path)
        if vector.method not in list_replays():
            raise ReplayError(f"no replay for method {vector.method!r}; known: {', '.join(list_replays())}")
        with torch.no_grad():
            importlib.import_module(f"scripts.replay.{vector.method}").replay(vector)
        if not compared:
            raise ReplayError(f"{vector.method}: nothing was compared")
    except AssertionError as error:
        return Result(str(path), False, str(error) or "assertion failed")
    except Exception as error:  # a bug in a replay must not hide the other files
        return Result(str(path), False, f"{type(error).__name__}: {error}")
    finally:
        _compared.reset(token)
    return Result(str(path), True, f"{vector.method}, {', '.join(compared)}")


def summary(results: Iterable[Result]) -> str:
    """Returns `N passed, N failed`."""
    outcomes = [result.passed for result in results]
    return f"{sum(outcomes)} passed, {len(outcomes) - sum(outcomes)} failed"


def same_index(name: str, got: Tensor, want: Tensor) -> None:
    """Integers (or bools) must be equal, entry for entry."""
    _note(name)
    _same_shape(name, got, want)
    different = (got.long() != want.long()).flatten()
    if different.any():
        first = int(different.to(torch.uint8).argmax())
        count, values = int(different.sum()), (int(got.flatten()[first]), int(want.flatten()[first]))
        raise ReplayError(f"{name}: {count} of {different.numel()} differ, the first at {first}: got {values[0]}, expected {values[1]}")


def close(name: str, got: Tensor, want: Tensor, atol: float = 1e-5) -> None:
    """Floats must agree within `atol` times the larger of 1 and the largest finite expected magnitude; inf and NaN in the same places."""
    _note(name)
    _same_shape(name, got, want)
    if not want.numel():
        return
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got[~finite].nan_to_num(0.5), want[~finite].nan_to_num(0.5)):
        raise ReplayError(f"{name}: inf or NaN in different places")
    scale = max(1.0, float(want[finite].abs().max())) if finite.any() else 1.0
    error = float((got[finite] - want[finite]).abs().max()) if finite.any() else 0.0
    if not error <= atol * scale:
        raise ReplayError(f"{name}: largest difference {error:.3g}, allowed {atol * scale:.3g}")


def same_value(name: str, got: Any, want: Any) -> None:
    """Requires plain Python values to be equal."""
    _note(name)
    if got != want:
        raise ReplayError(f"{name}: got {got}, expected {want}")


def _note(name: str) -> None:
    compared = _compared.get()
    if compared is not None and name not in compared:
        compared.append(name)


def _same_shape(name: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape:
        raise ReplayError(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _method_name(written: str) -> str:
    """Returns the registry name behind a written one: aliases, `-` for `_`, and families of schemas such as `tome-vit`."""
    name = written.lower()
    with suppress(ValueError):
        name = method_class(name).name
    known = list_replays()
    return next((n for n in (name, name.replace("-", "_"), name.split("-")[0]) if n in known), name)
