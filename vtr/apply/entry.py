"""What comes in at the base model: where visual tokens go, and prompts that do not fit a reduced cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._host import Host
from vtr.hosts._versions import given_cache
from vtr.types import VtrError


def placeholders(host: Host, module: Any, ids: Any, embeds: Any, cache: Any) -> Tensor:
    """Where visual tokens go `(B, q)` bool: placeholder ids, or embeddings equal to theirs."""
    if ids is not None:
        return torch.stack([ids == placeholder for placeholder in host.placeholder_ids]).any(0)
    table = module.get_input_embeddings()
    rows = [table(torch.tensor([placeholder], device=embeds.device)) for placeholder in host.placeholder_ids]
    found = torch.stack([(embeds == row.to(embeds.dtype)).all(-1) for row in rows]).any(0)
    if not (cache is not None and cache.get_seq_length()) and not bool(found.any()):
        raise VtrError(
            "vtr: inputs_embeds without input_ids must hold placeholder embeddings where images go, found none; if the features are "
            "merged already, or there is no image, pass visual_positions=, a bool mask (B, S)"
        )
    return found


def check_history(states: Any, kwargs: dict, length: int) -> None:
    """Refuses a prompt that repeats what a reduced cache holds: `generate` cuts it by the cache's physical length, which is shorter."""
    cache: Any = given_cache(kwargs)
    state = states.get(cache) if cache is not None else None
    held = int(cache.get_seq_length()) if state is not None else 0
    if state is None or not held or not state.dropped:
        return
    given, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    stands_for = held + state.dropped
    if isinstance(given, Tensor) and given.ndim == 2:
        wrong = given.shape[1] not in (stands_for + length, length)
    else:  # generate() leaves out a mask of ones
        wrong = isinstance(ids, Tensor) and ids.ndim == 2 and int(ids.max()) + 1 == held + length
    if wrong:
        raise ValueError(
            f"vtr: pass only the new tokens, got {length} tokens that do not continue a cache which stands for {stands_for} tokens and holds "
            f"{held}; after a reduction input_ids must not repeat the history"
        )


def swap(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of this one instance; returns what puts the old state back."""
    had = owner.__dict__.get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if had is None:
            owner.__dict__.pop(name, None)
        else:
            setattr(owner, name, had)

    return undo


def note_beams(model: Any, beams: dict[int, int]) -> Callable[[], None]:
    """Learns from `generate` how often it repeats every prompt (beams, several samples), for reports; returns what undoes it.

    Args:
        model: whose instance gets a wrapper around `_expand_inputs_for_generation`, if it has one.
        beams: thread -> repetitions, filled before the prefill.
    """
    name = "_expand_inputs_for_generation"
    original = getattr(model, name, None)
    if original is None:
        return lambda: None

    @wraps(original)
    def expand(*args: Any, **kwargs: Any) -> Any:
        beams[threading.get_ident()] = int(kwargs.get("expand_size", args[0] if args else 1))
        return original(*args, **kwargs)

    return swap(model, name, expand)


def repeats(source: Tensor, expected: int) -> int:
    """`expected` where rows of `source (B, ...)` really come in equal runs of that length, else 1."""
    if expected < 2 or len(source) % expected:
        return 1
    runs = source.unflatten(0, (-1, expected))
    return expected if bool((runs == runs[:, :1]).all()) else 1
