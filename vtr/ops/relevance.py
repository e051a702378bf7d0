"""How relevant a visual token is to the question, by embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def text_similarity(visual: Tensor, text: Tensor, asked: Tensor) -> Tensor:
    """Cosine `(G, N)` of each visual token to the mean of the text tokens asked.

    `visual (G, N, D)` and `text (G, M, D)` in the LLM's embedding space, `asked (G, M)` bool; float32 at least. 0 where nothing is asked.
    """
    wide = torch.promote_types(torch.promote_types(visual.dtype, text.dtype), torch.float32)
    total = torch.where(asked[..., None], text.to(wide), 0).sum(1)
    mean = total / asked.sum(1, keepdim=True).clamp_min(1)
    unit, question = F.normalize(visual.to(wide), dim=-1, eps=1e-12), F.normalize(mean, dim=-1, eps=1e-12)
    return (unit * question[:, None]).sum(-1)
