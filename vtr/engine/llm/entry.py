"""Reads what a caller gives the base model: where visual tokens go, where the prompt ends, and whether it fits a reduced cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtr.engine.clock import Clock
from vtr.engine.images import Images
from vtr.engine.signals import Tap
from vtr.hosts._layout import Kind
from vtr.hosts._protocol import Host
from vtr.hosts._versions import given_cache
from vtr.types import VtrError
from vtr.types.errors import WrongValue


@dataclass
class Encoded:
    """What the tower leaves for the LLM; it is a key of the output of `get_image_features` or `get_video_features`.

    Args:
        images: the images in the order they were encoded.
        kept: `(images * slots,)` bool, patches that are still there; None when nothing was removed.
        counts: visual tokens left of each image.
        taps: tower taps that steps of later stages read.
        rows: `(images, V)` tower row of each view.
        clock: time spent choosing so far.
        checks: counts of the steps so far, as in `Shrinking`.
        pool: makes tokens of patches where the taps hold patches of which the model pools several, see `Pooling.tokens`.
    """

    images: Images
    kept: Tensor | None
    counts: list[int]
    taps: dict[int, Tap]
    rows: Tensor
    clock: Clock
    checks: list[tuple[Any, Tensor, list[int]]]
    pool: Callable[[Tensor], Tensor] | None = None


@dataclass
class Entry:
    """What is known of one forward when the base model begins.

    Args:
        visuals: by kind `(B, q)` bool, placeholders of this call; empty where none can be.
        mask: attention mask of the base model.
        ids: `(B, q)` token ids, where a step asks for the question as text.
        encoded: by kind, what the tower left; comes while the base model runs if it encodes the images itself.
        expand: how often prompt rows repeat (beams).
        prompt: columns of this call that belong to the prompt, where `generate` says so.
        late: arguments of the outer model that get their values at the end of the LLM, see `vtr.engine.llm.labels`.
        answers: `(B, q)` bool, labelled columns.
        call: the `Call` of the language model while it runs, else None.
        outer: the entry that this one interrupts, when a hook runs the model in the middle of a forward.
        alone: the language model was called without its base model.
    """

    visuals: dict[Kind, Tensor] = field(default_factory=dict)
    mask: Any = None
    ids: Tensor | None = None
    encoded: dict[Kind, Encoded] = field(default_factory=dict)
    expand: int = 1
    prompt: int | None = None
    late: Any = None
    answers: Tensor | None = None
    call: Any = None
    outer: Entry | None = None
    alone: bool = False


PIXELS: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The argument of the base model that holds visuals of a kind."""


def kinds_given(host: Host, given: dict) -> list[Kind]:
    """Returns the kinds of visuals that come with a call of the base model, whose arguments are `given` by name.

    Without any, an image token is text, as for the model itself.

    Raises:
        VtrError: videos come, and this host has none.
    """
    made = given.get("mm_encoder_outputs")
    if isinstance(made, Tensor):
        raise VtrError(
            "vtr: mm_encoder_outputs must be what the model's encoding method returned, by kind, got a tensor; pass pixel_values"
        )
    made = made or {}
    found = [kind for kind, name in PIXELS.items() if given.get(name) is not None or made.get(kind)]
    if "video" in found and not host.has_video:
        raise VtrError(f"vtr: {host.name} is reduced on images only, got a video; pass its frames as images, or call the model without vtr")
    return found


def continued(host: Host, states: Any, kwargs: dict, source: Tensor) -> dict:
    """Returns the arguments of the base model with position ids where the model would count them from the length of a shortened cache.

    Args:
        host: the model.
        states: cache -> `Decoding`.
        kwargs: arguments; source: `(B, q, ...)`, new tokens.
    """
    cache: Any = given_cache(kwargs)
    if host.next_positions is None or kwargs.get("position_ids") is not None or cache is None:
        return kwargs
    state = states.get(cache)
    if state is None or not cache.get_seq_length():
        return kwargs
    (batch, length), before = source.shape[:2], int(cache.get_seq_length()) + state.dropped
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == before + length:
        columns = mask.long().cumsum(1)[:, -length:] - 1
    else:
        columns = (torch.arange(length, device=source.device) + before).expand(batch, -1)
    return {**kwargs, "position_ids": host.next_positions(columns)}


def placeholders(host: Host, module: Any, ids: Any, embeds: Any, cache: Any) -> dict[Kind, Tensor]:
    """Returns by kind where visual tokens go `(B, q)` bool: placeholder ids, or embeddings equal to theirs."""
    if ids is not None:
        return {kind: ids == placeholder for kind, placeholder in host.placeholder_ids.items()}
    table = module.get_input_embeddings()
    rows = {kind: table(torch.tensor([placeholder], device=embeds.device)) for kind, placeholder in host.placeholder_ids.items()}
    found = {kind: (embeds == row.to(embeds.dtype)).all(-1) for kind, row in rows.items()}
    if not (cache is not None and cache.get_seq_length()) and not any(bool(one.any()) for one in found.values()):
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
        raise WrongValue(
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
