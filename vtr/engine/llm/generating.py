"""What `generate` says about the prompt whose tokens it is about to pass to the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from vtr.engine.llm.entry import swap


@dataclass
class Said:
    """What one `generate` has said so far.

    Args:
        repeats: how often it repeats every prompt, until the first call.
        prompt: tokens of the prompt, None where it is given as embeddings.
        next: tokens of the call that it has prepared, how many of them are prompt, and whether they are a piece of the prompt.
        begun: the prompt whose images are being encoded.
    """

    repeats: int = 1
    prompt: int | None = None
    next: tuple[int, int, bool] | None = None
    begun: Tensor | None = None


class Generating:
    """What `generate` says, per thread: how often it repeats every prompt, and where the prompt ends in the next call.

    In the first pass of assisted decoding and prompt lookup, the guesses of the draft follow the prompt; they are no text that a method may
    read. Without a cache every pass brings all tokens so far, of which only the prompt is text. Nothing is known any more once it returns,
    and one that runs inside another (a model that is its own draft) leaves what the outer one has said.
    """

    def __init__(self) -> None:
        self._said: dict[int, Said] = {}

    def install(self, model: Any) -> list[Callable[[], None]]:
        """Wraps `generate` of this instance and three methods that it calls; returns the functions that put them back."""
        undo = []
        wraps = {
            "generate": self._generating,
            "_expand_inputs_for_generation": self._expanding,
            "prepare_inputs_for_generation": self._preparing,
            "_maybe_prepare_encoder_kwargs_for_generation": self._beginning,
        }
        for name, wrap in wraps.items():
            original = getattr(model, name, None)
            if original is not None:
                undo.append(swap(model, name, wrap(original)))
        return undo

    @property
    def said(self) -> Said:
        """What was said in this thread."""
        return self._said.setdefault(threading.get_ident(), Said())

    def take(self, length: int) -> tuple[int, int | None, bool]:
        """Returns, for the call of `length` tokens that begins in this thread, how often prompts repeat, how many columns are prompt
        (None = unknown, all), and whether they are a piece of it, as chunked prefill makes them."""
        said = self._said.get(threading.get_ident())
        if said is None:
            return 1, None, False
        (known, end, piece), repeats = said.next or (0, 0, False), said.repeats
        said.next, said.repeats = None, 1
        return (repeats, end, piece) if known == length else (repeats, None, False)

    def prompt(self) -> Tensor | None:
        """Returns the prompt `(B, S)` of token ids, or `(B, S, D)` of embeddings, whose images are encoded in this thread before its first call."""
        said = self._said.get(threading.get_ident())
        return None if said is None else said.begun

    def _generating(self, original: Callable) -> Callable:
        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            me = threading.get_ident()
            outer, self._said[me] = self._said.get(me), Said()
            try:
                return original(*args, **kwargs)
            finally:
                self._said.pop(me, None)
                if outer is not None:
                    self._said[me] = outer

        return generate

    def _beginning(self, original: Callable) -> Callable:
        @wraps(original)
        def begin(inputs_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            said = self.said
            said.begun = inputs_tensor
            try:
                return original(inputs_tensor, *args, **kwargs)
            finally:
                said.begun = None

        return begin

    def _expanding(self, original: Callable) -> Callable:
        @wraps(original)
        def expand(*args: Any, **kwargs: Any) -> Any:
            said, ids = self.said, kwargs.get("input_ids")
            said.repeats = int(kwargs.get("expand_size", args[0] if args else 1))
            said.prompt = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] else None
            return original(*args, **kwargs)

        return expand

    def _preparing(self, original: Callable) -> Callable:
        @wraps(original)
        def prepare(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            made, said = original(input_ids, *args, **kwargs), self.said
            ids, said.next = made.get("input_ids"), None
            if isinstance(ids, Tensor) and said.prompt is not None:
                given = input_ids.shape[1]
                said.next = ids.shape[1], said.prompt - (given - ids.shape[1]), given < said.prompt
            return made

        return prepare


def repeats(source: Tensor, expected: int) -> int:
    """Returns `expected` where rows of `source (B, ...)` really come in equal runs of that length, else 1."""
    if expected < 2 or len(source) % expected:
        return 1
    runs = source.unflatten(0, (-1, expected))
    return expected if bool((runs == runs[:, :1]).all()) else 1
