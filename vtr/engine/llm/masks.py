"""Finds which key columns are real, per layer and per call, and makes masks from that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtr.engine.llm.call import Call, Decoding
from vtr.hosts._layout import Kind
from vtr.hosts._protocol import Host, additive
from vtr.types import VtrError


def own_columns(mask: Any, embeds: Tensor, before: Any, held: Any, static: bool) -> Tensor:
    """Returns which tokens of this call are real `(B, q)` bool.

    Args:
        mask: what the language model got: None, 2-D `(B, before + q)` or `(B, q)`, 4-D or a dict of 4-D masks by layer type (`generate`
            makes those for compileable caches; the last row of a causal mask is the padding mask).
        embeds: `(B, q, D)`.
        before: tokens in front of this call, removed ones included; held: keys of layer 0 that the cache has.
        static: the cache is compileable and holds a reduction; its length is not asked for.

    Raises:
        VtrError: a mask of another kind or width.
    """
    batch, length = embeds.shape[:2]
    mask = any_of(mask)
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 4 and static):
        return torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        width = mask.shape[1]
        if static or width in (length, held + length):
            return mask[:, -length:].bool()
        if width >= before + length:
            return mask[:, before : before + length].bool()
        raise VtrError(
            f"vtr: attention_mask must have {before + length} columns ({before} of the text so far, removed tokens included, and {length} new "
            f"ones), got {width}; pass the mask of the whole text, or of the new tokens alone"
        )
    if isinstance(mask, Tensor) and mask.ndim == 4:
        if before != held:
            raise VtrError(
                "vtr: a 4-D attention mask cannot be re-indexed behind a prompt that lost tokens; pass the 2-D mask of the processor"
            )
        return visible(mask[:, 0, -1])[:, before : before + length].expand(batch, -1).clone()
    raise VtrError(f"vtr: cannot re-index an attention mask of type {type(mask).__name__}; pass the 2-D mask of the processor")


def any_of(mask: Any) -> Any:
    """Returns the mask of full-attention layers of a dict by layer type, or any where all layers are of another type."""
    return mask.get("full_attention", next(iter(mask.values()), None)) if isinstance(mask, dict) else mask


def visible(mask: Tensor) -> Tensor:
    """Returns which entries of a 4-D mask, bool or additive, let a key be seen."""
    return mask if mask.dtype == torch.bool else mask == 0


def only_padding(mask: Any, valid: Tensor, before: int) -> Tensor | None:
    """Returns per row `(B,)` whether a 4-D mask is causal but for padding; None where the mask is of another kind.

    Args:
        mask: of the language model.
        valid: `(B, q)` bool, real tokens of this call.
        before: keys in front of them.
    """
    mask = any_of(mask)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    seen = visible(mask)[:, :, :, : before + valid.shape[1]]
    rows = torch.arange(valid.shape[1], device=valid.device)[:, None] + before
    causal = torch.arange(seen.shape[-1], device=valid.device) <= rows
    plain = (seen == (causal & seen[:, :, -1:])).all(-1)
    counts = seen.sum(-1)
    itself = seen.diagonal(before, -2, -1) & (counts == 1)
    padding = ~valid[:, None] & (
        (counts == 0) | itself | (counts == seen.shape[-1])
    )  # rows whose tokens are padding see nothing, or anything
    return (plain | padding).all((1, 2)).expand(len(valid))


def count_rows(visuals: Mapping[Kind, Tensor], valid: Tensor, ids: Tensor | None, plain: Tensor | None, packs: bool) -> dict[str, Any]:
    """Counts per row what the host needs to plan widths: the one sync of a prefill before any removal.

    Args:
        visuals: by kind `(B, q)` bool, limited to real tokens.
        valid: `(B, q)` bool.
        ids: position ids or None.
        plain: from `only_padding`.
        packs: position ids that do not go on by one begin another prompt of the same row in this model.

    Returns:
        Per row `visual` (by kind), `text` and `fixed` (text and trailing padding) counts, whether rows are `unpadded` and positions `gapless`.

    Raises:
        VtrError: rows hold several packed prompts, or a mask hides more than padding and the future.
    """
    trailing = torch.where(valid.any(1), valid.flip(1).to(torch.uint8).argmax(1), 0)
    columns = [*(visual.sum(1) for visual in visuals.values()), valid.sum(1), trailing]
    ids = ids[0] if ids is not None and ids.ndim == 3 and len(ids) == 4 else ids  # in front of three kinds of rotary positions: of the text
    if ids is not None and ids.ndim == 2:
        known = ids.expand(len(valid), -1)
        least = known.masked_fill(~valid, torch.iinfo(known.dtype).max).amin(1)
        columns.append((known.masked_fill(~valid, -1).amax(1) - least + 1 == valid.sum(1)).long())
        columns.append((known.diff(dim=1) == 1).all(1).long())
    if plain is not None:
        columns.append(plain.long())
    counted = torch.stack(columns).tolist()
    by_kind, (real, trail, *rest) = dict(zip(visuals, counted, strict=False)), counted[len(visuals) :]
    if plain is not None and not all(rest[-1]):
        raise VtrError(
            "vtr: a 4-D attention mask that hides more than padding and later tokens cannot follow a removal; pass the 2-D mask of the "
            "processor, one prompt per row"
        )
    if packs and len(rest) > 1 and not all(rest[1]):
        raise VtrError(
            "vtr: position_ids that start again pack several prompts into one row, which a reduction cannot tell apart; give every prompt a "
            "row of its own, padded, with attention_mask"
        )
    text = [r - sum(v) for r, *v in zip(real, *by_kind.values(), strict=True)]
    return {
        "visual": by_kind,
        "text": text,
        "fixed": [t + e for t, e in zip(text, trail, strict=True)],
        "unpadded": all(r == valid.shape[1] for r in real),
        "gapless": ids is None or (bool(rest) and all(rest[0])),
    }


def shared(segment: list[int], tensors: list[Tensor]) -> list[Tensor]:
    """Returns the tensors with one for all layers of a segment."""
    first = {number: i for i, number in reversed(list(enumerate(segment)))}
    return [tensors[first[number]] for number in segment]


def columns(call: Call, layer: int) -> Tensor:
    """Returns the real key columns `(B, keys)` of a layer: those of its cache and those of this call. Layers of one segment share the tensor."""
    past, now = call.past[layer], call.now[layer]
    key = ("columns", call.segment[layer])
    if key not in call.masks:
        call.masks[key] = now if past is None else past if call.static else torch.cat([past.to(now.device), now], 1)
    return call.masks[key]


def mask(host: Host, call: Call, layer: int, hidden: Tensor, may_skip: bool = True) -> Any:
    """Returns the attention mask of a layer, made once per segment and type of layer; None where the backend needs none and `may_skip`."""
    if layer not in host.with_keys and not host.linear(layer):  # keys of an earlier layer, maybe for the last tokens alone
        every = hidden[:, :1].expand(-1, call.now[layer].shape[1], -1)
        made = mask(host, call, host.keys_of(layer), every, may_skip)
        return None if made is None else made[..., -hidden.shape[1] :, :]
    real = columns(call, layer).to(hidden.device)
    if host.linear(layer):  # tokens of this call alone; a single one is none of padding
        return None if hidden.shape[1] == 1 else real[:, -hidden.shape[1] :].long()
    kind = host.layer_kind(layer) if host.layer_kind(layer) in call.own_masks else ""
    slides = call.windowed and host.slides(layer)
    key = ("mask", call.segment[layer], kind, slides, may_skip, hidden.device)
    if key not in call.masks and not (kind or slides):
        call.masks[key] = host.causal_mask(hidden, real, call.cache, layer, may_skip)
    elif key not in call.masks:
        count = hidden.shape[1] if call.cache is None else call.cache.get_mask_sizes(hidden.shape[1], layer)[0]
        if kind:
            call.masks[key] = of_what_is_left(call, call.own_masks[kind], hidden, count)
        else:
            where = all_columns(call, layer).to(hidden.device)
            call.masks[key] = host.window_mask(hidden, real[:, -count:], where[:, -count:])
    return call.masks[key]


def own_masks(host: Host, given: Any, before: Any) -> dict[str, Tensor]:
    """Returns the masks by type of layer that a model whose images see themselves made for a prompt; none for
    a type of layer in which every token sees what is before it.

    Raises:
        VtrError: they cannot follow a removal: keys of an earlier turn come first, or the attention backend takes none.
    """
    masks = given if isinstance(given, dict) else {}
    found = {kind: made for kind, made in masks.items() if isinstance(made, Tensor) and made.ndim == 4}
    if found and int(before):
        raise VtrError(
            f"{host.name}: a later turn with an image cannot be reduced, since its tokens see each other; "
            "pass the whole text without a cache"
        )
    if host.language.backend.startswith("flash"):
        raise VtrError(
            f"{host.name}: {host.language.backend} takes no mask in which tokens of an image see each other; use attn_implementation='sdpa'"
        )
    return found


def of_what_is_left(call: Call, full: Tensor, hidden: Tensor, keys: int) -> Tensor:
    """Returns rows and columns of a mask that the model made for its whole prompt.

    Args:
        call: whose prompt says which tokens are left.
        full: `(B or 1, 1, q, q or more)`, bool or additive.
        hidden: `(B, S, D)`, the tokens left.
        keys: keys of the cache, at least S; those behind are hidden.
    """
    assert call.prompt is not None
    column, valid = call.prompt.tokens.column.to(hidden.device), call.prompt.tokens.valid.to(hidden.device)
    seen = visible(full.to(hidden.device)).expand(len(column), -1, -1, -1)
    rows = seen.gather(2, column[:, None, :, None].expand(-1, 1, -1, seen.shape[3]))
    both = rows.gather(3, column[:, None, None].expand(-1, 1, column.shape[1], -1)) & valid[:, None, None]
    both = both | torch.eye(column.shape[1], dtype=torch.bool, device=column.device)  # no row without a key
    both = torch.nn.functional.pad(both, (0, keys - column.shape[1]))
    return both if full.dtype == torch.bool else additive(both, hidden.dtype)


def key_columns(state: Decoding, layer: int, count: int) -> Tensor:
    """Returns the logical column `(B, count)` int64 of the first `count` keys of a layer's cache, -1 for filler."""
    where = state.where[layer]
    behind = count - where.shape[1]
    if behind <= 0:
        return where[:, :count]
    later = torch.arange(state.logical, state.logical + behind, device=where.device)
    return torch.cat([where, later.expand(len(where), -1)], 1)


def all_columns(call: Call, layer: int) -> Tensor:
    """Returns the logical column `(B, keys)` int64 of every key of a layer, those of the cache and those of this call; -1 for filler."""
    key = ("where", call.segment[layer])
    if key not in call.masks:
        now, past, here = call.now[layer], call.past[layer], call.now_where[layer]
        if here is None:
            here = torch.arange(now.shape[1], device=now.device).expand(len(now), -1)
        new = torch.where(now, here + call.before, -1)
        if past is not None:
            if call.state is None:
                old = torch.arange(past.shape[1], device=now.device).expand(len(now), -1)
            else:
                old = key_columns(call.state, layer, past.shape[1]).to(now.device)
            new = torch.cat([old, new], 1)
        call.masks[key] = new
    return call.masks[key]
