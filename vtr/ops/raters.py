"""Text tokens that rate visual tokens: those that the image itself points at (SparseVLM)."""

from __future__ import annotations

import torch
from torch import Tensor


def rater_score(visual: Tensor, text: Tensor, real: Tensor, asked: Tensor) -> Tensor:
    """How much the visual tokens point at each text token.

    Args:
        visual: `(G, N, D)` input embeddings of the LLM; compared by raw dot products, in float32 at least.
        text: `(G, M, D)`.
        real: `(G, N)` bool.
        asked: `(G, M)` bool, text tokens behind the image.

    Returns:
        `(G, M)`: softmax over the text tokens, mean over the visual tokens; 0 for text not asked. `O(G N M D)`.
    """
    wide = torch.promote_types(torch.promote_types(visual.dtype, text.dtype), torch.float32)
    logits = (visual.to(wide) @ text.to(wide).mT).masked_fill(~asked[:, None], -torch.inf)  # (G, N, M)
    weights = torch.where(real[..., None], logits.softmax(-1).nan_to_num(0.0), 0)
    return weights.sum(1) / real.sum(1, keepdim=True).clamp_min(1)


def raters(score: Tensor, asked: Tensor) -> Tensor:
    """`(G, M)` bool: text tokens with a score above the mean of those asked; all of these where none is (a single one, or all equal)."""
    mean = torch.where(asked, score, 0).sum(1, keepdim=True) / asked.sum(1, keepdim=True).clamp_min(1)
    above = asked & (score > mean)
    return torch.where(above.any(1, keepdim=True), above, asked)


def rated(rows: Tensor, by: Tensor) -> Tensor:
    """Mean over the raters `by (G, M)` of attention rows `(G, M, N)`: `(G, N)`."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.where(by[..., None], rows, 0).sum(1) / by.sum(1, keepdim=True).clamp_min(1)
