"""Reading q, k, v of chosen attention modules under any attention backend, without changing the backend.

Every attention of transformers calls `ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, ...)`. While somebody watches, each
entry of that mapping is replaced, under its own name and on that one instance, by a function that shows the watched modules' tensors and
then calls the original; everybody else passes straight through.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Watcher = Callable[[nn.Module, Tensor, Tensor, Tensor, float], Any]


class _Captured(Exception):
    """Ends an attention forward once its q, k and v are known."""


class AttentionTaps:
    """Watchers per attention module; installs itself with the first and uninstalls with the last."""

    def __init__(self) -> None:
        self._watchers: dict[nn.Module, list[Watcher]] = {}
        self._detours: dict[nn.Module, Callable[..., Any]] = {}
        self._names: list[str] = []
        self._lock = threading.RLock()

    def watch(self, module: nn.Module, watcher: Watcher) -> Callable[[], None]:
        """Calls `watcher(module, q, k, v, scaling)` before each attention of `module`; returns the function that stops it."""
        with self._lock:
            if not self._watchers:
                self._install()
            self._watchers.setdefault(module, []).append(watcher)

        def stop() -> None:
            with self._lock:
                watchers = self._watchers.get(module, [])
                if watcher in watchers:
                    watchers.remove(watcher)
                    if not watchers:
                        del self._watchers[module]
                    if not self._watchers:
                        self._uninstall()

        return stop

    def detour(self, module: nn.Module, run: Callable[..., Any]) -> Callable[[], None]:
        """Lets `run(function, module, q, k, v, mask, **kwargs)` call the backend's function for `module`, in pieces if it must; returns the
        function that stops it. One detour per module."""
        stop_watching = self.watch(module, _nothing)
        self._detours[module] = run

        def stop() -> None:
            self._detours.pop(module, None)
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

    def _install(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

        for name in [*functions._global_mapping, "eager"]:
            if not name.startswith("paged|") and name not in functions._local_mapping:
                functions[name] = self._wrap(functions._global_mapping.get(name))
                self._names.append(name)

    def _uninstall(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

        for name in self._names:
            del functions[name]
        self._names.clear()

    def _wrap(self, original: Callable | None) -> Callable:
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            for watcher in self._watchers.get(module, ()):
                scaling = kwargs.get("scaling")
                watcher(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
            # "eager" is not in the mapping: each file of transformers has its own
            function = original or sys.modules[type(module).__module__].eager_attention_forward
            detour = self._detours.get(module)
            if detour is not None:
                return detour(function, module, query, key, value, mask, *args, **kwargs)
            return function(module, query, key, value, mask, *args, **kwargs)

        return attention


def _nothing(*_tensors: Any) -> None:
    """A watcher that does not look."""


TAPS = AttentionTaps()


def project_qkv(attention: nn.Module, normed: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
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
            attention(hidden_states=normed, position_embeddings=rope, attention_mask=None)
        except _Captured:
            pass
    return found[0]


def project_kv(attention: nn.Module, normed: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """k and v as `project_qkv` gives them. Where the module has a `q_proj`, it projects one row, which stands in for all."""
    me, length = threading.get_ident(), normed.shape[1]

    def one_row(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return (args[0][:, :1],) if threading.get_ident() == me else None

    def all_rows(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        return output.expand(-1, length, -1) if threading.get_ident() == me else None

    query = getattr(attention, "q_proj", None)
    hooks = [] if query is None else [query.register_forward_pre_hook(one_row), query.register_forward_hook(all_rows)]
    try:
        return project_qkv(attention, normed, rope)[1:]
    finally:
        for hook in hooks:
            hook.remove()
