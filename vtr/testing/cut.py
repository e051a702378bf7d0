"""What a reduced model with layers of linear attention must compute: the prompt cut by hand, row by row and layer by layer.

A token that is gone was never read by such a layer, which no mask can say. Every row runs alone, without padding, through the unmodified layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cut_logits(model: Any, language: Any, inputs: dict[str, Tensor], positions: Tensor, expected: Any) -> Tensor:
    """Returns the logits `(B, S, V)` of the tokens that are left, zeros elsewhere.

    Args:
        model, language: the whole model, and its LLM with `layers`, `norm` and `rotary_emb`.
        inputs: keyword arguments of a batch.
        positions: `(4, B, S)` position ids.
        expected: what was removed and set in the LLM, see `vtr.testing.reference.Expected`.
    """
    seen: list[Tensor] = []
    hook = language.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    model(**inputs, position_ids=positions, use_cache=False)
    hook.remove()
    valid = inputs["attention_mask"].bool()
    logits = [_row(language, seen[0][r], positions[1:, r], valid[r], expected, r) for r in range(len(valid))]
    return model.lm_head(torch.stack(logits))


def _row(language: Any, embeds: Tensor, positions: Tensor, valid: Tensor, expected: Any, row: int) -> Tensor:
    """Returns the last hidden states `(S, D)` of one row, zeros where a token is gone."""
    columns = valid.nonzero()[:, 0]
    hidden, full = embeds[None, columns], torch.zeros_like(embeds)
    sizes = torch.ones(len(embeds), dtype=embeds.dtype)
    for number, layer in enumerate(language.layers):
        for at, into in expected.merges:
            if at == number:
                hidden, sizes = _merged(hidden, columns, into[row], sizes)
        for at, changed, values in expected.values:
            if at == number:
                hidden = torch.where(changed[row, columns][:, None], values[row, columns], hidden)
        for at, keep in expected.drops:
            if at == number:
                hidden, columns = hidden[:, keep[row, columns]], columns[keep[row, columns]]
        length = len(columns)
        full_attention = language.config.layer_types[number] == "full_attention"
        later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        mask = torch.zeros(later.shape, dtype=hidden.dtype).masked_fill(later, torch.finfo(hidden.dtype).min) if full_attention else None
        rope = language.rotary_emb(hidden, positions[:, None, columns])
        hidden = layer(hidden, position_embeddings=rope, attention_mask=mask)
    full[columns] = language.norm(hidden)[0]
    return full


def _merged(hidden: Tensor, columns: Tensor, into: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `(1, S', D)` with means of what is merged by column, and the sizes `(S,)` afterwards."""
    target, weight = into[columns], sizes[columns]
    total = torch.zeros(len(into), hidden.shape[-1], dtype=hidden.dtype).index_add(0, target, hidden[0] * weight[:, None])
    count = torch.zeros_like(sizes).index_add(0, target, weight)
    return (total / count.clamp(min=1)[:, None])[None, columns], count
