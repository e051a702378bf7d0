"""Copies of a reduced model, or of a part of it: they are whole models, without anything of the reduction."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from operator import is_
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vtr.hosts._wrappers import modules_of
from vtr.types import VtrError

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_ABSENT = object()


class CleanCopies:
    """Remembers what modules are like before a reduction is installed, so that copies and pickles of them are like that.

    Args:
        model: its modules are looked at.
        owner: the reduction, kept alive by the modules that it changes.
    """

    def __init__(self, model: nn.Module, owner: Any) -> None:
        self.owner = owner
        self._first = RemovableHandle.next_id  # hooks are numbered in the order in which they are registered
        self._before = [(module, None if _of_torch(type(module)) else vars(module).copy()) for module in modules_of(model)]  # type: ignore[arg-type]

    def follow(self) -> Callable[[], None]:
        """Gives every module that was changed since a `__getstate__` without the changes; returns what takes it away again."""
        changed, ours = [], range(self._first, RemovableHandle.next_id)
        for module, before in self._before:
            now = vars(module)
            before_it, behind_it = now["_forward_pre_hooks"], now["_forward_hooks"]
            hooked = (before_it and max(before_it) in ours) or (behind_it and max(behind_it) in ours)
            same = before is None or (len(now) == len(before) and all(map(is_, now.values(), before.values())))
            if same and not hooked:
                continue
            before = now if before is None else before
            swapped = {} if same else {n: before.get(n, _ABSENT) for n in now.keys() | before.keys() if now.get(n) is not before.get(n)}
            swapped["__getstate__"] = before.get("__getstate__", _ABSENT)
            now["__getstate__"] = partial(self._state, module, swapped, ours)
            changed.append((now, swapped["__getstate__"]))
        self._before.clear()
        return partial(_take_away, changed)

    def _state(self, module: nn.Module, swapped: dict[str, Any], ours: range) -> _State:
        own = swapped["__getstate__"]
        state = dict(type(module).__getstate__(module) if own is _ABSENT else own())  # type: ignore[attr-defined]
        for name, value in swapped.items():
            state.pop(name, None)
            if value is not _ABSENT:
                state[name] = value
        for name in _HOOKS:
            state[name] = type(state[name])((i, hook) for i, hook in state[name].items() if i not in ours)
        return _State(state, type(module).__name__)


def refuse_replicas(model: nn.Module) -> Callable[[], None]:
    """Lets calls of replicas of `model` raise a `VtrError`, and returns what ends that.

    `torch.nn.DataParallel` makes one for every device: they have the hooks and swapped methods of the reduced model, but other weights.
    """

    def enter(called: nn.Module, _args: tuple) -> None:
        if called is not model:
            raise VtrError(
                f"vtr: a replica of a reduced {type(model).__name__} was called, as torch.nn.DataParallel makes them for several devices, which "
                "share one reduction; use one process for each device (DistributedDataParallel, accelerate), or DataParallel with one device"
            )

    return model.register_forward_pre_hook(enter, prepend=True).remove


@cache
def _of_torch(kind: Any) -> bool:
    """Whether modules of a class get hooks of a reduction at most, and no attributes: layers and containers of torch itself."""
    return kind.__module__.startswith("torch.nn.")


class _State(dict):
    """The attributes of a copied module. A deep copy and a pickle take them as a plain dict; a shallow copy reads them, and is refused."""

    def __init__(self, state: dict[str, Any], kind: str) -> None:
        super().__init__(state)
        self.kind = kind

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(super().items()), memo)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return dict, (), None, None, iter(super().items())

    def __iter__(self) -> Any:
        raise VtrError(
            f"vtr: a shallow copy of a reduced {self.kind} would share its reduced modules; use copy.deepcopy, or copy it outside the reduction"
        )

    keys = __iter__


def _take_away(changed: list[tuple[dict[str, Any], Any]]) -> None:
    for attributes, before in changed:
        if before is _ABSENT:
            attributes.pop("__getstate__", None)
        else:
            attributes["__getstate__"] = before
