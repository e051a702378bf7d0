"""The floors: the same weights cut by hand to given lengths, with no selection and no hooks.

Survivors are the first tokens of every row, which costs what any other choice would. Nothing is masked: every row has the same length.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.bench.schedule import Schedule
from vtr.hosts._protocol import Host
from vtr.hosts._towers import RowTower
from vtr.hosts._versions import cache_keyword
from vtr.types import VtrError


@dataclass(frozen=True)
class Encoded:
    """What enters the LLM: `visual (V, T, D)` or `(T, D)`, and the same for every LLM layer behind which the model adds features."""

    visual: Tensor
    beside: Sequence[Tensor] = ()


def check_floors(host: Host) -> None:
    """Refuses a model whose LLM cannot be run by hand as it runs by itself.

    Raises:
        VtrError: naming the host and the way out.
    """
    plain = all(host.layer_kind(i) == "full_attention" for i in range(host.llm_layers))
    if not plain or host.bidirectional or host.shared or host.per_token:
        raise VtrError(
            f"bench: no floors can be cut by hand for {host.name!r}, whose LLM has other layers or arguments than LLaVA's; give --no-floors"
        )


def can_cut(host: Host, schedule: Schedule, full: Schedule) -> bool:
    """Tells whether there is a floor for these lengths.

    Frozen layers are cut by hand for SDPA and the rotary embedding of Llama only, towers of plain rows of patches only.

    Args:
        host: the model.
        schedule: the lengths; full: those of the full model.
    """
    if schedule.frozen and (host.attention_name(tower=False) != "sdpa" or host.next_positions is not None):
        return False
    return _by_hand(host) or (schedule.grid, schedule.tower, schedule.projector) == (full.grid, full.tower, full.projector)


def _by_hand(host: Host) -> bool:
    """Whether the tower is run block by block; any other one runs as a whole, by the model's own method."""
    return host.tower.embeddings is not None and isinstance(host.tower, RowTower)


@torch.no_grad()
def encode(host: Host, schedule: Schedule, inputs: Mapping[str, Tensor]) -> Encoded:
    """Runs tower and projector on the lengths of a schedule.

    Args:
        host: the model.
        schedule: lengths.
        inputs: of the model, with `pixel_values`; already small where the schedule has a grid.
    """
    if _by_hand(host):
        pixels = inputs["pixel_values"]
        return Encoded(_cut_tower(host, schedule, pixels.flatten(0, 1) if pixels.ndim == 5 else pixels))
    own = getattr(host.base, host.encode["image"])
    names = set(inspect.signature(own).parameters) & set(inputs)
    found = own(**{name: inputs[name] for name in names})
    beside = (getattr(found, "deepstack_features", None) or ()) if host.beside is not None else ()
    return Encoded(_joined(getattr(found, "pooler_output", found)), [_joined(one) for one in beside])


def _joined(features: Any) -> Tensor:
    """Returns features of all images as one tensor; some releases have one per image."""
    return torch.cat(list(features)) if isinstance(features, (list, tuple)) else features


def _cut_tower(host: Host, schedule: Schedule, pixels: Tensor) -> Tensor:
    """Returns the projected tokens `(V, projector, D)` of pixel values `(V, 3, H, W)`."""
    tower = host.tower.module
    hidden = tower.embeddings(pixels, interpolate_pos_encoding=True) if schedule.grid else tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    features = []
    for i, (attention, mlp) in enumerate(schedule.tower):
        layer = host.tower.blocks[i]
        hidden = hidden[:, :attention]
        if mlp == attention:
            hidden = layer(hidden, None)
        else:
            before, after = host.tower.before_attention(layer), host.tower.before_mlp(layer)
            hidden = (hidden + host.tower.attention(layer)(before(hidden), attention_mask=None)[0])[:, :mlp]
            hidden = hidden + host.tower.mlp(layer)(after(hidden))
        if i in host.feature_layers:
            features.append(hidden)
    stop = host.tower.prefix_tokens + schedule.projector
    return host.projector(torch.cat([f[:, host.tower.prefix_tokens : stop] for f in features], -1))


def prefill(
    host: Host, schedule: Schedule, inputs: Mapping[str, Tensor], encoded: Encoded, span: tuple[int, int], static: Any = None
) -> tuple[Tensor, Any]:
    """Runs the LLM on the lengths of a schedule.

    Args:
        host: the model.
        schedule: lengths.
        inputs: of the model; every row has its image at the same place.
        encoded: from `encode`.
        span: first position of the image and the one behind its last.
        static: an empty static cache to fill; None makes one that grows.

    Returns:
        Logits of the last token `(B, 1, vocabulary)` and the KV cache.
    """
    ids, (start, stop) = inputs["input_ids"], span
    behind = ids.shape[1] - stop
    embed = host.language.module.get_input_embeddings()
    text = embed(torch.cat([ids[:, :start], ids[:, stop:]], 1))  # (B, T, D)
    count = schedule.llm[0] - text.shape[1]
    tokens = _first(encoded.visual, len(ids), count)
    if tokens.shape[1] < count:  # newline tokens, and tokens that are restored behind the projector
        tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, count - tokens.shape[1], -1)], 1)
    hidden = torch.cat([text[:, :start], tokens, text[:, start:]], 1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    if host.next_positions is not None:  # time, row and column
        positions = positions[None].expand(3, -1, -1)
    rope = host.language.module.rotary_emb(hidden, position_ids=positions)
    cache = host.new_cache() if static is None else static
    mask = None
    for i, layer in enumerate(host.language.blocks):
        length = schedule.llm[i]
        if static is not None and (not i or hidden.shape[1] != length):  # columns behind the prompt are hidden, as in the model itself
            mask = host.causal_mask(hidden[:, :length], ids.new_ones(len(ids), length, dtype=torch.bool), cache, i, True)
        if hidden.shape[1] != length:
            hidden = _cut(hidden, length, behind)
            rope = (_cut(rope[0], length, behind), _cut(rope[1], length, behind))
        if i in schedule.frozen:
            hidden = _frozen(host, layer, i, hidden, rope, cache, (start, length - behind))
        else:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, use_cache=True, **{cache_keyword(): cache})
        if i < len(encoded.beside):
            stop = length - behind
            hidden[:, start:stop] += _first(encoded.beside[i], len(ids), stop - start)
    return host.model.lm_head(host.language.module.norm(hidden[:, -1:])), cache


def _first(features: Tensor, rows: int, count: int) -> Tensor:
    """Returns the first `count` visual tokens of every prompt `(B, count, D)`."""
    return features.reshape(rows, -1, features.shape[-1])[:, :count]


def _cut(tensor: Tensor, length: int, behind: int) -> Tensor:
    """Returns, along the last dimension but one, the first tokens and the `behind` last."""
    return torch.cat([tensor[..., : length - behind, :], tensor[..., tensor.shape[-2] - behind :, :]], -2)


def _frozen(host: Host, layer: Any, i: int, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: Any, span: tuple[int, int]) -> Tensor:
    """Runs a layer that computes text tokens only: keys and values of all tokens, queries and MLP of the text."""
    attention, normed = host.language.attention(layer), host.language.before_attention(layer)(hidden)
    start, stop = span
    length = hidden.shape[1]
    rows = torch.cat([torch.arange(start, device=hidden.device), torch.arange(stop, length, device=hidden.device)])
    key, value = (_heads(project(normed), attention.head_dim) for project in (attention.k_proj, attention.v_proj))
    query = _heads(attention.q_proj(normed[:, rows]), attention.head_dim)
    query, key = _rotate(query, rope, rows), _rotate(key, rope, None)
    key, value = cache.update(key, value, i)
    seen = torch.arange(key.shape[2], device=hidden.device) <= rows[:, None]  # (T, S), longer in a static cache
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=attention.scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    text = hidden[:, rows] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    text = text + host.language.mlp(layer)(layer.post_attention_layernorm(text))
    return torch.cat([text[:, :start], hidden[:, start:stop], text[:, start:]], 1)


def _heads(tensor: Tensor, head_dim: int) -> Tensor:
    """Splits heads: `(B, S, H * d)` -> `(B, H, S, d)`."""
    return tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(tensor: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor | None) -> Tensor:
    """Returns the rotary embedding of `tensor (B, H, S, d)` in half-split order, as Llama has it."""
    cos, sin = (table[:, None] if rows is None else table[:, None, rows] for table in rope)
    first, second = tensor.chunk(2, -1)
    return tensor * cos + torch.cat([-second, first], -1) * sin


def next_token(model: Any, cache: Any, token: Tensor, position: Tensor, mask: Tensor) -> Tensor:
    """Runs one decode step of the model as it stands, hooks included if it has any; `(B, 1, vocabulary)`."""
    return model(input_ids=token, position_ids=position, attention_mask=mask, use_cache=True, **{cache_keyword(): cache}).logits
