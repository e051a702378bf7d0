"""A shortened KV cache that is changed, copied, or that outlives its reduction.

What is known of a cache follows it when its rows are repeated, selected or reordered and when it is copied. Once the reduction is removed,
nothing is left on the model that knows which tokens a cache lacks, so the cache itself refuses to grow; a cache from a file does too. It
can still be read, cropped and copied, and once it is empty it is a cache like any other. Everything here holds its cache weakly, so that
its memory is freed as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from vtr.types import VtrError

ROW_CHANGES = ("batch_repeat_interleave", "batch_select_indices", "reorder_cache")
"""Methods of a cache that change its prompt rows."""
SHORTENED = (
    "vtr: this KV cache was shortened by a reduction that is removed since, or comes from a file, and positions and masks would be wrong "
    "without that reduction; continue inside it, or start with a new cache"
)


class Refusal:
    """In place of the `update` of one cache, which every layer calls before it attends."""

    def __init__(self, cache: Any) -> None:
        self._cache = weakref.ref(cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return Refusal, (self._cache(),)  # of the copy, in a deep copy and in a file

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Updates the cache if it is empty by now.

        Raises:
            VtrError: it still holds what the reduction left.
        """
        cache = self._cache()
        if cache is None or int(cache.get_seq_length()):
            raise VtrError(SHORTENED)
        del cache.update
        return cache.update(*args, **kwargs)


class _Follower:
    """What is known of a cache is copied with it."""

    def __init__(self, states: Any, cache: Any) -> None:
        self._states, self._cache = states, weakref.ref(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Follower:
        cache = self._cache()
        copied = memo.get(id(cache))
        if copied is None:  # not copied as a part of its cache
            return self
        if cache in self._states:
            self._states[copied] = deepcopy(self._states[cache], memo)
        return _Follower(self._states, copied)

    def __reduce__(self) -> tuple[Any, ...]:
        cache = self._cache()
        return (_refusing, (cache,)) if cache in self._states else (type(None), ())

    def adopt(self, states: Any, copied: Any) -> Any:
        """Files the state under a shallow copy, which shares the layers of its original; returns it.

        Raises:
            VtrError: nothing is known any more of the original.
        """
        if copied is self._cache():
            return None
        state = self._states.get(self._cache()) if self._states is states and self._cache() is not None else None
        if state is None:
            if not int(copied.get_seq_length()):
                return None
            raise VtrError(SHORTENED)
        states[copied] = state
        return state

    def change_rows(self, name: str, given: Any) -> None:
        """Changes the rows of the cache by its own method `name`, and those of its state alike."""
        cache = self._cache()
        getattr(type(cache), name)(cache, given)
        state = self._states.get(cache)
        if state is None:
            return
        if name == "batch_repeat_interleave":
            state.rows(lambda t: t.repeat_interleave(int(given), 0))
        else:
            index = torch.as_tensor(given)

            def pick(table: Tensor) -> Tensor:
                return table[index.to(table.device)]

            state.rows(pick)


class _RowChange:
    """In place of a method of one cache that changes its rows."""

    def __init__(self, follower: _Follower, name: str) -> None:
        self._follower, self._name = follower, name

    def __call__(self, given: Any) -> None:
        self._follower.change_rows(self._name, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> _RowChange:
        return _RowChange(deepcopy(self._follower, memo), self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._follower._cache(), self._name)


def follow(states: Any, cache: Any) -> None:
    """Lets the state that `states`, a `WeakKeyDictionary`, has of `cache` follow it: into copies, and when its rows change."""
    cache.vtr_follower = follower = _Follower(states, cache)
    for name in ROW_CHANGES:
        if hasattr(type(cache), name):
            setattr(cache, name, _RowChange(follower, name))


def refuse_growth(caches: Iterable[Any]) -> None:
    """Makes shortened caches refuse to grow, now that their reduction is removed."""
    for cache in list(caches):
        for name in ("vtr_follower", *ROW_CHANGES):
            vars(cache).pop(name, None)
        _refusing(cache)


def _refusing(cache: Any) -> None:
    cache.update = Refusal(cache)
