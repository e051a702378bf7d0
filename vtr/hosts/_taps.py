"""Reading q, k, v of chosen attention modules under any attention backend, without changing the backend.

Every attention of transformers asks `ALL_ATTENTION_FUNCTIONS` for its function and calls `function(module, query, key, value, mask, ...)`.
While a module is watched, that one registry hands out each function inside a wrapper which shows the tensors of watched modules to their
watchers and passes every other call on as it came. Watchers are an attribute of the module they watch, so they die with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

Watcher = Callable[[nn.Module, Tensor, Tensor, Tensor, float], Any]
_NAMES = ("module", "query", "key", "value", "attention_mask")
_WATCHERS, _DETOUR = "_vtr_watchers", "_vtr_detour"


class _Captured(Exception):
    """Ends an attention forward once its q, k and v are known."""


class _Tapped:
    """An attention function of any signature that shows what watched modules pass to it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = args[0] if args else kwargs["module"]
        watchers = module.__dict__.get(_WATCHERS)
        if not watchers:
            return self.function(*args, **kwargs)
        rest = dict(kwargs)
        given = [args[i] if i < len(args) else rest.pop(name, None) for i, name in enumerate(_NAMES)]
        _, query, key, value, _ = given
        scaling = rest.get("scaling")
        for watcher in watchers:
            watcher(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        detour = module.__dict__.get(_DETOUR)
        if detour is None:
            return self.function(*args, **kwargs)
        return detour(self.function, *given, *args[len(_NAMES) :], **rest)


def _tapped(function: Any) -> _Tapped:
    """Wraps a function once."""
    return function if isinstance(function, _Tapped) else _Tapped(function)


@cache
def _tapped_registry(kind: type) -> type:
    """Returns the class of transformers' registry with its functions inside `_Tapped`: those of today, and those registered later."""

    class Tapped(kind):  # type: ignore[misc, valid-type]
        _vtr_tapped = True

        def __getitem__(self, name: str) -> Any:
            return _tapped(super().__getitem__(name))

        def get_interface(self, *args: Any, **kwargs: Any) -> Any:
            """Returns what the model gets without a tap, its own default for "eager" included, inside `_Tapped`."""
            return _tapped(super().get_interface(*args, **kwargs))

    Tapped.__name__, Tapped.__qualname__, Tapped.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Tapped


class AttentionTaps:
    """The watched attention modules. The registry is tapped from the first on, until the last is left alone or deleted."""

    def __init__(self) -> None:
        self._watched: dict[int, weakref.finalize] = {}  # id of a module -> what runs when it is deleted while it is watched
        self._lock = threading.RLock()

    def watch(self, module: nn.Module, watcher: Watcher) -> Callable[[], None]:
        """Calls `watcher(module, q, k, v, scaling)` before each attention of `module`; returns the function that stops it."""
        known = weakref.ref(module)  # the returned function keeps no module alive

        def stop() -> None:
            with self._lock:
                found = known()
                if found is None:
                    return
                left = tuple(w for w in found.__dict__.get(_WATCHERS, ()) if w is not shown)
                if left:
                    found.__dict__[_WATCHERS] = left
                else:
                    found.__dict__.pop(_WATCHERS, None)
                    self._forget(id(found))

        def shown(*tensors: Any) -> Any:
            return watcher(*tensors)

        with self._lock:
            if id(module) not in self._watched:
                self._watched[id(module)] = gone = weakref.finalize(module, self._forget, id(module))
                gone.atexit = False
            module.__dict__[_WATCHERS] = (*module.__dict__.get(_WATCHERS, ()), shown)
            self._tap(True)
        return stop

    def _forget(self, module: int) -> None:
        with self._lock:
            gone = self._watched.pop(module, None)
            if gone is not None:
                gone.detach()
            if not self._watched:
                self._tap(False)

    def _tap(self, on: bool) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

        kind: Any = type(functions)
        tapped = "_vtr_tapped" in vars(kind)
        if tapped != on:
            functions.__class__ = _tapped_registry(kind) if on else kind.__mro__[1]

    def detour(self, module: nn.Module, run: Callable[..., Any]) -> Callable[[], None]:
        """Lets `run(function, module, q, k, v, mask, **kwargs)` call the backend's function for `module`, in pieces if it must; returns the
        function that stops it. One detour per module."""
        stop_watching = self.watch(module, _nothing)
        module.__dict__[_DETOUR] = run
        known = weakref.ref(module)

        def stop() -> None:
            found = known()
            if found is not None:
                found.__dict__.pop(_DETOUR, None)
            stop_watching()

        return stop

    @contextmanager
    def watching(self, module: nn.Module, watcher: Watcher) -> Any:
        """`watch` for the length of a block."""
        stop = self.watch(module, watcher)
        try:
            yield
        finally:
            stop()


def _nothing(*_tensors: Any) -> None:
    """A watcher that does not look."""


TAPS = AttentionTaps()


def project_qkv(attention: nn.Module, normed: Tensor, rope: tuple[Tensor, Tensor] | None, **extra: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `(B, H, S, d)` that `attention` makes of `normed (B, S, D)`, after the rotary embedding, by running it up to its attention
    function and no further. Exact for every family: biases, q/k norms and any rotary embedding are the module's own."""
    me = threading.get_ident()
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def capture(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _scaling: float) -> None:
        if threading.get_ident() == me:
            found.append((query, key, value))
            raise _Captured

    with TAPS.watching(attention, capture):
        try:
            attention(hidden_states=normed, position_embeddings=rope, attention_mask=None, **extra)
        except _Captured:
            pass
    return found[0]


def project_kv(attention: nn.Module, normed: Tensor, rope: tuple[Tensor, Tensor], **extra: Any) -> tuple[Tensor, Tensor]:
    """k and v as `project_qkv` gives them. Where the module has a `q_proj`, it projects one row, which stands in for all."""
    me, length = threading.get_ident(), normed.shape[1]

    def one_row(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return (args[0][:, :1],) if threading.get_ident() == me else None

    def all_rows(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        return output.expand(-1, length, -1) if threading.get_ident() == me else None

    query = getattr(attention, "q_proj", None)
    hooks = [] if query is None else [query.register_forward_pre_hook(one_row), query.register_forward_hook(all_rows)]
    try:
        return project_qkv(attention, normed, rope, **extra)[1:]
    finally:
        for hook in hooks:
            hook.remove()
