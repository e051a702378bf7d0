"""A shortened KV cache that is copied, or that outlives its reduction.

A deep copy is known to the reduction like its original. Once the reduction is removed, nothing is left on the model that knows which tokens
a cache lacks, so the cache itself refuses to grow; a cache from a file does too. It can still be read, cropped and copied, and once it is
empty it is a cache like any other. Both riders hold their cache weakly, so that its memory is freed as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from vtr.types import VtrError


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
            raise VtrError(
                "vtr: this past_key_values was shortened by a reduction that is removed since, or comes from a file, and positions and masks "
                "would be wrong without that reduction; continue inside it, or start with a new cache"
            )
        del cache.update
        return cache.update(*args, **kwargs)


class _Rider:
    """What is known of a cache is copied with it."""

    def __init__(self, states: Any, cache: Any) -> None:
        self._states, self._cache = states, weakref.ref(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rider:
        cache = self._cache()
        copied = memo.get(id(cache))
        if copied is None:  # not copied as a part of its cache
            return self
        if cache in self._states:
            self._states[copied] = deepcopy(self._states[cache], memo)
        return _Rider(self._states, copied)

    def __reduce__(self) -> tuple[Any, ...]:
        cache = self._cache()
        return (_refusing, (cache,)) if cache in self._states else (type(None), ())


def follow(states: Any, cache: Any) -> None:
    """Files the state of every later deep copy of `cache` in `states` too, a `WeakKeyDictionary` from caches."""
    cache.vtr_rider = _Rider(states, cache)


def spend(caches: Iterable[Any]) -> None:
    """Makes shortened caches refuse to grow, now that their reduction is removed."""
    for cache in list(caches):
        vars(cache).pop("vtr_rider", None)
        _refusing(cache)


def _refusing(cache: Any) -> None:
    cache.update = Refusal(cache)
