"""How relevant a visual token is to the question, by embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.unit import row_products


def text_similarity(visual: Tensor, text: Tensor, asked: Tensor) -> Tensor:
    """Cosine `(G, N)` of each visual token to the mean of the text tokens asked.

    `visual (G, N, D)` and `text (G, M, D)` in the LLM's embedding space, `asked (G, M)` bool; float32 at least. 0 where nothing is asked.
    """
    wide = torch.promote_types(torch.promote_types(visual.dtype, text.dtype), torch.float32)
    total = torch.where(asked[..., None], text.to(wide), 0).sum(1)
    mean = total / asked.sum(1, keepdim=True).clamp_min(1)
    visual = visual.to(wide)
    length = torch.linalg.vector_norm(visual, dim=-1).clamp_min(1e-12)
    return row_products(visual, F.normalize(mean, dim=-1, eps=1e-12)) / length


def clip_relevance(image: Tensor, text: Tensor, real: Tensor | None = None) -> Tensor:
    """Minus the cosine of CLIP's image embeddings to its text embeddings, mean over the segments of the text.

    Args:
        image: `(G, N, C)`.
        text: `(M, C)`, or `(G, M, C)`.
        real: `(G, M)` bool, segments that count; None for all.

    Returns:
        `(G, N)` float32.
    """
    text = text if text.ndim == 3 else text[None]
    cosine = F.normalize(image.float(), dim=-1, eps=0) @ F.normalize(text.float(), dim=-1, eps=0).mT  # (G, N, M)
    if real is None:
        return -cosine.mean(-1)
    return -torch.where(real[:, None], cosine, 0).sum(-1) / real.sum(1, keepdim=True)
