"""Calls of a model's `forward` that pass by its hooks, as wrappers such as PEFT make them, are sent through the hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn


class DirectCalls:
    """Swaps the `forward` of one model for one that calls the model itself, unless the model is what calls it.

    Args:
        model: the outermost model that has hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._called: set[int] = set()  # threads in which the model was called and its `forward` comes next
        self._sent: set[int] = set()  # threads in which a direct call was sent through the hooks, and has not arrived
        self._on = True

    def install(self, undo: list[Callable[[], None]]) -> None:
        """Swaps `forward`; what `remove()` must undo is appended as it happens."""
        model, called, sent = self.model, self._called, self._sent
        original, had = model.forward, model.__dict__.get("forward")

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not self._on:  # compiled code begins with the call of the model
                return original(*args, **kwargs)
            me = threading.get_ident()
            if me in called or me in sent:  # the latter: hooks that were compiled left no mark, where compiling was given up behind them
                called.discard(me)
                sent.discard(me)
                return original(*args, **kwargs)
            sent.add(me)
            try:
                return model(*args, **kwargs)
            finally:
                sent.discard(me)

        def put_back() -> None:
            self._on = False  # somebody may have wrapped it
            if model.__dict__.get("forward") is forward:
                del model.__dict__["forward"]
                if had is not None:
                    model.__dict__["forward"] = had

        model.__dict__["forward"] = forward
        undo.append(put_back)
        undo.append(model.register_forward_pre_hook(self._enter, prepend=True).remove)

    def _enter(self, _module: nn.Module, _args: tuple) -> None:
        if not torch.compiler.is_compiling():
            self._called.add(threading.get_ident())
