"""Greedy max-sum diversification: pick after pick, the token least similar to everything picked so far."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.blocks import suits_cpu
from vtr.ops.fused import fused
from vtr.ops.unit import Products, gram_pays, row_products, unit_rows


def greedy_max_sum(tokens: Tensor, real: Tensor, first: Tensor, most: int) -> Tensor:
    """Order in which tokens are picked so that the sum of their cosine similarities stays small.

    The state is one running sum of similarities per token. It is fed from one Gram matrix `(G, N, N)` where that pays (all picks may then run as
    one kernel), else from a product with the picked token, `O(N D)` per pick; without a host sync.

    Args:
        tokens: `(G, N, D)`, any float dtype; similarities and sums in float32 at least. Zero tokens are similar to nothing.
        real: `(G, N)` bool, candidates, at least one per row.
        first: `(G,)` int64, the token picked first; a candidate.
        most: number of picks.

    Returns:
        `(G, most)` int64, distinct among the real tokens as long as the row has that many; what follows is arbitrary. Ties: lowest index.
    """
    if most and len(tokens) and suits_cpu(tokens):
        return torch.stack([_of_row(*row, most) for row in zip(tokens, real, first.tolist(), strict=True)])
    unit = unit_rows(tokens)
    gram = unit @ unit.mT if gram_pays(tokens, unit, most) else None
    rows = unit if gram is None else gram
    if gram is not None and fused():
        from vtr.ops._triton_greedy import pick_in_turn

        return pick_in_turn(gram, first, real, most, total=True)

    total = torch.zeros_like(unit[..., 0]).masked_fill_(~real, torch.inf)  # similarity to everything picked so far
    picks = [first][:most]
    while len(picks) < most:
        pick = picks[-1]
        row = rows.gather(1, pick[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]
        total += row_products(unit, row) if gram is None else row
        total.scatter_(1, pick[:, None], torch.inf)  # never twice
        picks.append(total.argmin(1))
    return torch.stack(picks, 1) if picks else first.new_zeros(len(first), 0)


def _of_row(tokens: Tensor, real: Tensor, first: int, most: int) -> Tensor:
    """`greedy_max_sum` of one row on a CPU, where picks may be looked at: `tokens (N, D)`, `real (N,)` -> `(most,)`."""
    unit = unit_rows(tokens)
    gram = unit @ unit.T if gram_pays(tokens[None], unit[None], most) else None
    products, total = Products(unit), torch.zeros_like(unit[:, 0]).masked_fill_(~real, torch.inf)
    best, picks = lambda: int(total.argmin()), [first]
    while len(picks) < most:
        pick = picks[-1]
        total[pick] = torch.inf  # never twice
        total += products.of(pick, best) if gram is None else gram[pick]
        picks.append(best())
    return torch.tensor(picks)
