"""Greedy max-sum diversification: pick after pick, the token least similar to everything picked so far."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.fused import fused


def greedy_max_sum(tokens: Tensor, real: Tensor, first: Tensor, most: int) -> Tensor:
    """Order in which tokens are picked so that the sum of their cosine similarities stays small.

    The state is one running sum of similarities per token. It is fed from one Gram matrix `(G, N, N)` where that fits under the
    activations of a layer of width D (all picks may then run as one kernel), else from a product with the picked token; both are `O(N D)`
    per pick, without a host sync.

    Args:
        tokens: `(G, N, D)`, any float dtype; similarities and sums in float32 at least. Zero tokens are similar to nothing.
        real: `(G, N)` bool, candidates, at least one per row.
        first: `(G,)` int64, the token picked first; a candidate.
        most: number of picks.

    Returns:
        `(G, most)` int64, distinct among the real tokens as long as the row has that many; what follows is arbitrary. Ties: lowest index.
    """
    tokens = tokens.detach()
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    unit = F.normalize(wide.nan_to_num(), dim=-1, eps=1e-12)
    groups, n, width = unit.shape
    group = torch.arange(groups, device=unit.device)
    # about 12 D values per token live in one layer: residual, norm, q, k, v, and the three of the MLP
    gram = unit @ unit.mT if (n + width) * unit.element_size() <= 12 * width * tokens.element_size() else None
    if gram is not None and fused():
        from vtr.ops._triton_greedy import pick_in_turn

        return pick_in_turn(gram, first, real, most, total=True)

    total = torch.zeros_like(unit[..., 0]).masked_fill_(~real, torch.inf)  # similarity to everything picked so far
    picks = [first][:most]
    while len(picks) < most:
        pick = picks[-1]
        total += gram[group, pick] if gram is not None else _similarity(unit, unit[group, pick])
        total.scatter_(1, pick[:, None], torch.inf)  # never twice
        picks.append(total.argmin(1))
    return torch.stack(picks, 1) if picks else first.new_zeros(groups, 0)


def _similarity(unit: Tensor, picked: Tensor) -> Tensor:
    """`(G, N)` products; two equal columns, because a product with one column rounds differently in batches of different size."""
    return torch.bmm(unit, picked[:, :, None].expand(-1, -1, 2))[..., 0]
