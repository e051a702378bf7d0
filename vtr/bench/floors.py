"""The floors: the same weights cut by hand to given lengths, with no selection and no hooks.

Survivors are the first tokens of every row, which costs what any other choice would. Nothing is masked: every row has the same length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtr.bench.schedule import Schedule
from vtr.hosts._host import Host
from vtr.hosts._versions import cache_keyword


def can_cut(host: Host, schedule: Schedule) -> bool:
    """Tells whether there is a floor for these lengths: frozen layers are cut by hand for SDPA only."""
    return not schedule.frozen or host.attention_name(tower=False) == "sdpa"


def encode(host: Host, schedule: Schedule, pixels: Tensor) -> Tensor:
    """Runs tower and projector on the lengths of a schedule.

    Args:
        host: the model.
        schedule: lengths.
        pixels: `(V, 3, H, W)`, one row per view; already small where the schedule has a grid.

    Returns:
        `(V, projector, D)`.
    """
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
    host: Host, schedule: Schedule, inputs: Mapping[str, Tensor], visual: Tensor, span: tuple[int, int], static: Any = None
) -> tuple[Tensor, Any]:
    """Runs the LLM on the lengths of a schedule.

    Args:
        host: the model.
        schedule: lengths.
        inputs: of the model; every row has its image at the same place.
        visual: from `encode`.
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
    tokens = visual.reshape(len(ids), -1, visual.shape[-1])[:, :count]
    if tokens.shape[1] < count:  # newline tokens, and tokens that are restored behind the projector
        tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, count - tokens.shape[1], -1)], 1)
    hidden = torch.cat([text[:, :start], tokens, text[:, start:]], 1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
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
    return host.model.lm_head(host.language.module.norm(hidden[:, -1:])), cache


def _cut(tensor: Tensor, length: int, behind: int) -> Tensor:
    """Returns, along dimension 1, the first tokens and the `behind` last."""
    return torch.cat([tensor[:, : length - behind], tensor[:, tensor.shape[1] - behind :]], 1)


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
