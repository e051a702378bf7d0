"""What a KV cache holds in front of a call: which of its keys are real, and which columns of the whole prompt they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtr.engine.checkpointing import refuse_switched_on
from vtr.engine.llm.call import Call, Decoding
from vtr.engine.llm.lifetime import Refusal, follow
from vtr.engine.llm.masks import all_columns, any_of, columns, key_columns, shared, visible
from vtr.hosts._protocol import Host
from vtr.hosts._versions import output_cache, unknown_release
from vtr.types import VtrError

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""Keyword arguments by which several prompts share one row."""


def state_of(states: Any, cache: Any, batch: int, length: int) -> Decoding | None:
    """Returns what an earlier reduced call left in a cache, after whatever was done to the cache since.

    Args:
        states: `WeakKeyDictionary` from caches.
        cache: the KV cache of a call, or None.
        batch, length: prompt rows of the call, and its tokens.

    Raises:
        VtrError: the cache has other rows than before, by something other than its own methods.
    """
    if cache is None:
        return None
    state = states.get(cache)
    if state is None and (follower := vars(cache).get("vtr_follower")) is not None:
        state = follower.adopt(states, cache)  # a shallow copy of a cache that was reduced
    if state is None:
        return None
    if not (state.static and length == 1):  # a compiled decode step must not ask the device
        held, had = int(cache.get_seq_length()), state.valid[state.counted].shape[1]
        if held == 0:
            del states[cache]
            return None
        if held < had and not state.static:
            _crop(state, had - held)
    if len(state.valid[0]) != batch:
        raise VtrError(
            f"vtr: this KV cache was reduced for {len(state.valid[0])} prompt rows, got {batch}; change its rows with the cache's own "
            "batch_repeat_interleave, batch_select_indices or reorder_cache, or start with a new cache"
        )
    return state


def _crop(state: Decoding, count: int) -> None:
    """Forgets the last `count` keys of every layer."""
    state.valid = shared(state.segment, [v[:, : v.shape[1] - count] for v in state.valid])
    state.where = shared(state.segment, [w[:, : v.shape[1]] for w, v in zip(state.where, state.valid, strict=True)])
    length = state.valid[state.counted].shape[1] + state.dropped
    state.logical = min(state.logical, length)
    if state.attending is not None:
        state.attending.crop(length)


def check_window(host: Host, cache: Any) -> None:
    """Refuses a static cache, which follows no distances between tokens that are left, where layers have windows.

    Raises:
        VtrError: it can grow beyond the window.
    """
    window = host.sliding_window()
    if window is not None and cache is not None and cache.is_compileable and cache.get_max_length(0) >= window:
        raise VtrError(
            f"vtr: a static cache can grow beyond the sliding window of {window} tokens, where distances count removed tokens; use a dynamic cache"
        )


def check_prefill(host: Host, cache: Any, state: Decoding | None, before: int, encoded: bool, kwargs: dict, needs_tower: bool) -> None:
    """Refuses a prompt that a reduction cannot follow.

    Args:
        host: the model.
        cache: of the call, or None; state: what an earlier reduced call left in it; before: tokens in front of the call.
        encoded: whether all visuals were encoded inside the reduction.
        kwargs: keyword arguments of the language model.
        needs_tower: some step acts in the tower.

    Raises:
        VtrError: says what to do instead.
    """
    if state is not None and state.static:
        raise VtrError("vtr: a second prefill on a static cache that holds a reduction is not supported; use a dynamic cache")
    if before and host.hybrid and len(kwargs["inputs_embeds"]) > 1:
        raise VtrError(
            f"vtr: a later turn with images in a batch leaves filler between the turns, which layers of linear attention on {host.name} would "
            "read; pass the whole text without a cache, or one prompt at a time"
        )
    if cache is not None and cache.is_compileable and host.hybrid:
        raise VtrError(
            f"vtr: a static cache of {host.name}, whose layers of linear attention hold states, cannot follow a removal; use a dynamic cache"
        )
    packed = [name for name in PACKING if kwargs.get(name) is not None]
    if packed:
        raise VtrError(
            f"vtr: {packed[0]} packs several prompts into one row, which a reduction cannot tell apart; give every prompt a row of its own, "
            "padded, with attention_mask"
        )
    if needs_tower and not encoded:
        raise VtrError("vtr: a tower method needs images encoded inside the reduction; pass pixel_values, not features made before")
    if torch.is_grad_enabled():
        for layer in host.language.blocks:
            refuse_switched_on(layer)


def check_unknown(cache: Any, mask: Any, length: int) -> None:
    """Refuses a cache that a reduction must have shortened, though none is known to: layers of different lengths, or a mask of more columns.

    Args:
        cache: not empty, or None.
        mask: attention mask of the call.
        length: tokens of the call.

    Raises:
        VtrError: it was rebuilt from a reduced one.
    """
    if cache is None or cache.is_compileable or torch.compiler.is_compiling():
        return
    if isinstance(vars(cache).get("update"), Refusal):  # says so itself, and better
        return
    layers = [i for i, layer in enumerate(getattr(cache, "layers", ())) if hasattr(layer, "get_seq_length")]
    lengths, held, columns = {int(cache.get_seq_length(i)) for i in layers}, int(cache.get_seq_length()), 0
    if isinstance(mask, Tensor) and mask.ndim == 2:
        columns = mask.shape[1] - length
    if len(lengths) > 1 or 0 < held < columns:
        said = (
            f"its layers hold {min(lengths)} to {max(lengths)} tokens"
            if len(lengths) > 1
            else f"it holds {held} tokens, the mask {columns}"
        )
        raise VtrError(
            f"vtr: a reduction shortened this KV cache ({said}), but what was removed is not known; pass the cache of the reduced call itself, or "
            "start with a new one"
        )


def past_columns(
    state: Decoding | None, mask: Any, before: Any, held: Any, batch: int, length: int, layers: int, device: torch.device
) -> list[Tensor | None]:
    """Returns per layer which keys of the cache are real `(B, keys)` bool, None where it is empty.

    The caller's mask decides where it has columns for them; else what earlier calls said, and ones where no call of ours said anything.

    Args:
        state: what an earlier reduced call left in the cache; before: tokens in front of this call.
        mask: attention mask of the call; see `own_columns`, which checks it.
        held: keys in the cache, of the first layer that has any.
        batch, length: B and q of this call.
        layers: of the LLM; device: of the call.
    """
    static, mask = state is not None and state.static, any_of(mask)
    told = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > length
    if state is None:
        if not held:
            return [None] * layers
        if told:
            past = mask[:, :held].bool()
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            past = visible(mask[:, 0, -1])[:, :held].expand(batch, -1)
        else:
            past = torch.ones(batch, held, dtype=torch.bool, device=device)
        return [past] * layers
    if not told or (static and torch.compiler.is_compiling()):
        return list(state.valid)
    known = mask[:, :-length] if static else mask[:, : before if mask.shape[1] >= before + length else held]
    known = known.bool()
    if not static and known.shape[1] == held < before:  # counted in keys of the cache, as an own decode loop may do
        where = key_columns(state, state.counted, held).to(known.device)
        logical = torch.ones(batch, before + 1, dtype=torch.bool, device=known.device)
        known = logical.scatter(1, torch.where(where < 0, before, where), known)[:, :-1]
    padded = torch.nn.functional.pad(known, (0, state.valid[state.counted].shape[1] if static else 0), value=True)
    found: dict[int, Tensor] = {}
    for i in range(layers):
        number = state.segment[i]
        if number not in found:
            where = key_columns(state, i, state.valid[i].shape[1])
            found[number] = (where >= 0) & padded.to(where.device).gather(1, where.clamp(0, padded.shape[1] - 1))
    return [found[number] for number in state.segment]


def check_returned(call: Call, output: Any, counted: Sequence[int]) -> None:
    """Compares the cache that came out of the language model with what this call was to leave in it; host integers only.

    Args:
        call: the call.
        output: of the language model.
        counted: layers that have keys.

    Raises:
        VtrError: another cache came out, or one of another length: this release of transformers works in a way that is not known here.
    """
    if torch.compiler.is_compiling():
        return
    cache = call.cache
    found = next((part for part in output if part is cache), None) if isinstance(output, tuple) else output_cache(output)
    if found is not cache:
        raise VtrError(f"vtr: the language model must return the KV cache that it was given, got another one; {unknown_release()}")
    assert cache is not None
    if cache.is_compileable:
        return
    for i in counted if call.prompt is not None else (counted[0], counted[-1]):
        past = call.past[i]
        wanted, got = (0 if past is None else past.shape[1]) + call.now[i].shape[1], int(cache.get_seq_length(i))
        if got != wanted:
            raise VtrError(f"vtr: layer {i} must leave {wanted} tokens in the KV cache, got {got}; {unknown_release()}")


def evict(call: Call, host: Host, layer: int) -> None:
    """Takes from the cache of the layers in front of `layer` what is removed there, once the prompt has run."""
    prompt, kept, where = call.prompt, call.now[layer], call.now_where[layer]
    assert prompt is not None and call.cache is not None
    if where is None:
        return
    done: dict[int, Tensor] = {}
    for i in (i for i in host.with_keys if i < layer):
        column, segment = call.now_where[i], call.segment[i]
        if segment not in done:
            count = call.incoming
            own = torch.arange(call.now[i].shape[1], device=where.device).expand_as(call.now[i])
            if column is None:
                done[segment] = where.clamp_min(0)
            else:
                table = torch.zeros(len(own), count + 1, dtype=torch.int64, device=where.device)
                table.scatter_(1, torch.where(call.now[i], column, count), own)
                done[segment] = table.gather(1, where.clamp_min(0))
        held, index = call.cache.layers[i], done[segment]
        first = held.keys.shape[2] - call.now[i].shape[1]
        for name in ("keys", "values"):
            whole = getattr(held, name)
            spot = index.to(whole.device)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
            setattr(held, name, torch.cat([whole[:, :, :first], whole[:, :, first:].gather(2, spot)], 2))
    call.now[:layer], call.now_where[:layer] = [kept] * layer, [where] * layer
    call.segment[:layer] = [call.segment[layer]] * layer
    call.masks.clear()


def store(states: Any, call: Call, host: Host) -> None:
    """Files what this call left under its cache."""
    cache, layers = call.cache, len(host.language.blocks)
    state = states.get(cache) or Decoding()
    valid = [columns(call, i) for i in range(layers)]
    if call.prompt is not None:
        state.where = [all_columns(call, i) for i in range(layers)]
        state.logical = call.before + call.incoming
        state.counted = host.counted
        state.dropped += call.incoming - call.now[host.counted].shape[1]
    state.valid, state.segment, state.shift = valid, list(call.segment), list(call.positions.shift)
    if cache.is_compileable and not state.static:
        size = cache.get_max_length(0)
        padded = [torch.nn.functional.pad(v, (0, size - v.shape[1]), value=True) for v in state.valid]
        state.valid = shared(state.segment, padded)
        state.static = True
    if cache not in states:
        states[cache] = state
        follow(states, cache)
