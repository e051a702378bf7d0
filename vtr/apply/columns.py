"""Which key columns are real, per layer and per call, and the masks made from that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.apply.call import CacheState, Call
from vtr.apply.lifetime import follow
from vtr.hosts._host import Host
from vtr.types import VtrError


def valid_tokens(mask: Any, embeds: Tensor, state: CacheState | None) -> Tensor:
    """Which tokens of this call are real `(B, q)` bool.

    Args:
        mask: what the language model got: None, 2-D `(B, past + q)` or `(B, q)`, 4-D or a dict of 4-D masks by layer type (`generate`
            makes those for compileable caches; the last row of a causal mask is the padding mask).
        embeds: `(B, q, D)`.
        state: of a cache that was reduced before.

    Raises:
        VtrError: a mask of another kind.
    """
    batch, length = embeds.shape[:2]
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -length:].bool()
    if isinstance(mask, Tensor) and mask.ndim == 4:
        if state is not None:
            return torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
        last = mask[:, 0, -1]
        last = last if last.dtype == torch.bool else last == 0
        return last[:, :length].expand(batch, -1).clone()
    raise VtrError(f"vtr: cannot re-index an attention mask of type {type(mask).__name__}; pass the 2-D mask of the processor")


def survey(call: Call, valid: Tensor, ids: Tensor | None) -> dict[str, Any]:
    """Counts per row that the host needs to plan widths: the one sync of a prefill before any removal.

    Args:
        call: `call.visual` is limited to real tokens.
        valid: `(B, q)` bool.
        ids: position ids or None.

    Returns:
        Per row `visual`, `text` and `fixed` (text and trailing padding) counts, whether rows are `unpadded` and positions `gapless`.
    """
    assert call.visual is not None
    call.visual = call.visual & valid
    trailing = torch.where(valid.any(1), valid.flip(1).to(torch.uint8).argmax(1), 0)
    columns = [call.visual.sum(1), valid.sum(1), trailing]
    if ids is not None and ids.ndim == 2:
        known = ids.expand(len(valid), -1)
        least = known.masked_fill(~valid, torch.iinfo(known.dtype).max).amin(1)
        columns.append((known.masked_fill(~valid, -1).amax(1) - least + 1 == valid.sum(1)).long())
    visual, real, trail, *rest = torch.stack(columns).tolist()
    text = [r - v for r, v in zip(real, visual, strict=True)]
    return {
        "visual": visual,
        "text": text,
        "fixed": [t + e for t, e in zip(text, trail, strict=True)],
        "unpadded": all(r == valid.shape[1] for r in real),
        "gapless": ids is None or (bool(rest) and all(rest[0])),
    }


def reconcile(states: Any, cache: Any, state: CacheState) -> CacheState | None:
    """The state of a cache that may have been cropped (assisted decoding) or reset since it was last seen."""
    length, had = int(cache.get_seq_length()), state.valid[0].shape[1]
    if length == 0:
        del states[cache]
        return None
    if length < had and not state.static:
        state.valid = shared(state.segment, [v[:, : v.shape[1] - (had - length)] for v in state.valid])
    return state


def shared(segment: list[int], tensors: list[Tensor]) -> list[Tensor]:
    """One tensor for all layers of a segment."""
    first = {number: i for i, number in reversed(list(enumerate(segment)))}
    return [tensors[first[number]] for number in segment]


def split_segment(call: Call, layer: int) -> None:
    """Layers from `layer` on see other keys than before."""
    offset = max(call.segment) + 1
    call.segment = call.segment[:layer] + [number + offset for number in call.segment[layer:]]


def columns(call: Call, layer: int) -> Tensor:
    """Real key columns `(B, keys)` of a layer: those of its cache and those of this call. Layers of one segment share the tensor."""
    past, now = call.past[layer], call.now[layer]
    key = ("columns", call.segment[layer])
    if key not in call.masks:
        call.masks[key] = now if past is None else past if call.static else torch.cat([past.to(now.device), now], 1)
    return call.masks[key]


def mask(host: Host, call: Call, layer: int, hidden: Tensor, may_skip: bool = True) -> Any:
    """The attention mask of a layer, made once per segment; None where the backend needs none and `may_skip`."""
    real = columns(call, layer)
    key = ("mask", call.segment[layer], may_skip, str(hidden.device))
    if key not in call.masks:
        call.masks[key] = host.causal_mask(hidden, real.to(hidden.device), call.cache, layer, may_skip)
    return call.masks[key]


def store(states: Any, call: Call, layers: int) -> None:
    """Files what this call left under its cache."""
    cache = call.cache
    assert call.positions is not None
    state = states.get(cache) or CacheState()
    state.valid = [columns(call, i) for i in range(layers)]
    state.segment = list(call.segment)
    state.shift = list(call.positions.shift)
    if cache.is_compileable and not state.static:
        size = cache.get_max_length(0)
        padded = [torch.nn.functional.pad(v, (0, size - v.shape[1]), value=True) for v in state.valid]
        state.valid = shared(state.segment, padded)
        state.static = True
    if call.prefill:
        state.dropped += call.incoming - call.now[0].shape[1]
    if cache not in states:
        states[cache] = state
        follow(states, cache)
