"""Attention rows of text tokens over a whole prompt, from queries and keys that are given per image group."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.attention_rows import attention_rows
from vtr.ops.gather import take

CHUNK = 128
"""Query rows at a time: below one layer's activations."""


def prompt_rows(
    query: Tensor,
    visual_key: Tensor,
    text_key: Tensor,
    real: Tensor,
    text_real: Tensor,
    row: Tensor,
    *,
    sees_text: Tensor | None = None,
    sees_visual: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Attention weights, averaged over the heads, of text queries to the visual tokens of one image each.

    The softmax runs over the text and the visual tokens of the whole prompt, other images of the same prompt included (one group per image),
    with logits in float32 (float64 stays). Time `O(G H R (N + M) d)`, memory `O(G H min(R, 128) (N + M) + G G H R)`.

    Args:
        query: `(G, R, H, d)`, rows wanted, after the rotary embedding; row r is the same token in all groups of a prompt.
        visual_key: `(G, N, H or H / groups, d)`.
        text_key: `(G, M, H or H / groups, d)`.
        real: `(G, N)` bool.
        text_real: `(G, M)` bool.
        row: `(G,)` int64, prompt of each group.
        sees_text: `(G, R, M)` bool, text tokens a query may see; None = all.
        sees_visual: `(G, R, N)` bool; None = all.
        scaling: factor on the logits, the model's own; None = `d ** -0.5`.

    Returns:
        `(G, R, N)`; 0 where hidden or not real.
    """
    others = None  # (G, G, 1, 1), images of the same prompt
    if len(row) > 1:
        others = (row[:, None] == row).fill_diagonal_(False)[:, :, None, None]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = []
    for start in range(0, query.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        asked = query[:, part].transpose(1, 2)  # (G, H, r, d)
        visual = attention_rows(asked, visual_key.transpose(1, 2), scaling, keys=real, softmax=False)  # (G, H, r, N)
        if sees_visual is not None:
            visual = visual.masked_fill(~sees_visual[:, None, part], -torch.inf)
        text = attention_rows(asked, text_key.transpose(1, 2), scaling, keys=text_real, softmax=False)
        if sees_text is not None:
            text = text.masked_fill(~sees_text[:, None, part], -torch.inf)
        every = [visual, text]
        if others is not None:
            every.append(visual.logsumexp(-1).expand(len(row), -1, -1, -1).masked_fill(~others, -torch.inf).logsumexp(1)[..., None])
        found.append(torch.cat(every, -1).softmax(-1)[..., : visual.shape[-1]].mean(1).nan_to_num(0.0))
    return torch.cat(found, 1) if found else real.new_zeros(*real.shape[:1], 0, real.shape[1], dtype=torch.float32)


def causal_text(text_real: Tensor) -> Tensor:
    """`(G, M, M)` bool: text token m sees the real text tokens up to itself; `text_real (G, M)`, text in position order."""
    order = torch.arange(text_real.shape[1], device=text_real.device)
    return (order <= order[:, None]) & text_real[:, None]


def last_text(text_real: Tensor) -> Tensor:
    """`(G, 1)` int64: the last real text token of each row; 0 where there is none."""
    if not text_real.shape[1]:
        return torch.zeros(len(text_real), 1, dtype=torch.int64, device=text_real.device)
    order = torch.arange(text_real.shape[1], device=text_real.device)
    return torch.where(text_real, order, 0).amax(1, keepdim=True)


def last_token_row(
    visual_query: Tensor,
    text_query: Tensor,
    visual_key: Tensor,
    text_key: Tensor,
    real: Tensor,
    text_real: Tensor,
    row: Tensor,
    *,
    scaling: float | None = None,
) -> Tensor:
    """Attention weights, averaged over the heads, of the last text token of each prompt to the visual tokens of one image each.

    Args:
        visual_query, text_query: `(G, N, H, d)` and `(G, M, H, d)`, after the rotary embedding.
        visual_key, text_key, real, text_real, row, scaling: as for `prompt_rows`.

    Returns:
        `(G, N)`; a prompt without text asks with its last visual token.
    """
    tail = torch.where(real, torch.arange(real.shape[1], device=real.device), 0).amax(1, keepdim=True)
    last = take(visual_query, tail)  # (G, 1, H, d)
    if text_real.shape[1]:
        last = torch.where(text_real.any(1)[:, None, None, None], take(text_query, last_text(text_real)), last)
    return prompt_rows(last, visual_key, text_key, real, text_real, row, scaling=scaling)[:, 0]
