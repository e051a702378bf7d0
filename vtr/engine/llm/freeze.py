"""Freezing: in a layer, visual tokens give keys and values and are not computed themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine.llm.call import Call
from vtr.engine.llm.masks import mask
from vtr.engine.llm.prompt import Prompt
from vtr.hosts._taps import project_kv
from vtr.hosts._versions import cache_keyword, given_cache
from vtr.ops.gather import compaction, take
from vtr.types import VtrError


class _Interleaved:
    """Stands in for the cache of one frozen layer: keys and values of the text come in, those of all tokens go on in original order."""

    def __init__(self, cache: Any, key: Tensor, value: Tensor, visual: Tensor, text: Tensor, length: int) -> None:
        self.cache, self.key, self.value = cache, key, value
        self.visual, self.text, self.length = visual, text, length

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `Cache.update`, with the full length."""
        key, value = self._full(key, self.key), self._full(value, self.value)
        return (key, value) if self.cache is None else self.cache.update(key, value, layer, *args, **kwargs)

    def _full(self, text: Tensor, visual: Tensor) -> Tensor:
        out = text.new_empty(*text.shape[:2], self.length, text.shape[-1])
        for part, index in ((visual, self.visual), (text, self.text)):  # filler is written first and overwritten by the real owner
            out.scatter_(2, index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[-1]), part)
        return out


def freeze(call: Call, layer: int, module: nn.Module, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
    """Returns the arguments of a frozen layer: text rows only, with the mask rows, rotary rows and cache that make them see everything.

    Args:
        call: this forward; `frozen[layer]` of its prompt is filled for `refill`.
        layer: index of the layer; module: the layer.
        hidden: `(B, S, D)`.
        kwargs: the layer's keyword arguments.
    """
    prompt = call.prompt
    assert prompt is not None
    tokens, language, length = prompt.tokens, prompt.host.language, hidden.shape[1]
    frozen = tokens.valid & ~prompt.text.gather(1, tokens.column)
    held = [0] * len(hidden)  # visual and newline tokens of every row
    for row, count, lines in zip(tokens.images.row, prompt.counts, prompt.newlines, strict=True):
        held[row] += count + lines
    text, text_real = compaction(~frozen, length - min(held))
    visual, _ = compaction(frozen, max(held))
    rope = kwargs["position_embeddings"]
    norm, attention = language.before_attention(module), language.attention(module)
    prompt.probing = True
    ids = kwargs["position_ids"] if language.by_position else None
    own = {} if ids is None else {"position_ids": take(ids, visual)}
    key, value = project_kv(attention, norm(take(hidden, visual)), (take(rope[0], visual), take(rope[1], visual)), **own)
    prompt.probing = False
    if language.backend.startswith("flash"):
        if len(hidden) > 1 or not prompt.unpadded:
            raise VtrError(
                "vtr: freezing a padded batch needs masks by rows, which FlashAttention cannot take; use attn_implementation='sdpa'"
            )
        rows_mask = None  # `by_runs` calls the kernel once per stretch of text
    else:
        full = mask(prompt.host, call, layer, hidden, may_skip=False).expand(len(hidden), -1, -1, -1)  # (B, 1, S, keys)
        rows_mask = full.gather(2, text[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[-1]))
    kwargs = {
        **kwargs,
        "attention_mask": rows_mask,
        "position_embeddings": (take(rope[0], text), take(rope[1], text)),
        "position_ids": None if ids is None else take(ids, text),
        cache_keyword(): _Interleaved(given_cache(kwargs), key, value, visual, text, length),
    }
    prompt.frozen[layer] = (hidden, text, text_real)
    return take(hidden, text), kwargs


def by_runs(current: Callable[[], Call | None], layer: int) -> Callable[..., Any]:
    """A detour for a frozen layer under FlashAttention, one sample: text rows attend in stretches, each a causal chunk that ends where the
    stretch ends (bottom-right aligned), so that no mask is needed.

    Args:
        current: the call of this thread.
        layer: index of the frozen layer.
    """

    def run(function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        call = current()
        prompt = None if call is None else call.prompt
        if prompt is None or layer not in prompt.frozen or prompt.probing or query.shape[2] == 1:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        hidden, text, _ = prompt.frozen[layer]
        columns = text[0].tolist()
        before = key.shape[2] - hidden.shape[1]  # keys of earlier turns
        ends = [i + 1 for i, c in enumerate(columns) if i + 1 == len(columns) or columns[i + 1] != c + 1]
        parts, start = [], 0
        for end in ends:
            stop = before + columns[end - 1] + 1
            parts.append(function(module, query[:, :, start:end], key[:, :, :stop], value[:, :, :stop], None, *args, **kwargs)[0])
            start = end
        return torch.cat(parts, 1), None

    return run


def refill(prompt: Prompt, layer: int, output: Any) -> Any:
    """Puts the text rows that a frozen layer returned back among the untouched visual ones."""
    hidden, text, real = prompt.frozen.pop(layer)
    new = output[0] if isinstance(output, tuple) else output
    index = text[..., None].expand(-1, -1, hidden.shape[-1])
    full = hidden.scatter(1, index, torch.where(real[..., None], new, hidden.gather(1, index)))
    return (full, *output[1:]) if isinstance(output, tuple) else full
