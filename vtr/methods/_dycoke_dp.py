"""DyCoke's part for new tokens (DP): which visual tokens the later layers attend to while an answer is made. Not a method.

1. What a new token pays to the visual tokens in one layer, mean over the heads, is compared with what the token before paid, by cosine.
2. Where it is another picture (a cosine below the threshold, or the first new token), the visual tokens that it pays most are chosen anew.
3. Otherwise the tokens chosen last stay chosen. The released code attends to everything then (`compat="authors"`).
4. The cache stays whole: what is not chosen now may be chosen for a later token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.topk import topk_mask
from vtr.types import Selection, View

PAID, CHOSEN = "paid", "chosen"


class Chosen(NamedTuple):
    """`keep (G, N)` bool, tokens attended to; `similarity (G,)` to the token before, 0 for the first; `anew (G,)` bool, chosen by this token."""

    keep: Tensor
    similarity: Tensor
    anew: Tensor


def attended_tokens(
    paid: Tensor, real: Tensor, before: tuple[Tensor, Tensor] | None, pruned: float = 0.7, threshold: float = 0.9, authors: bool = False
) -> Chosen:
    """Chooses the visual tokens that a new token attends to.

    Args:
        paid: `(G, N)` attention of the new token, mean over heads; compared in float32 at least.
        real: `(G, N)` bool.
        before: what the new token before paid and the tokens chosen then, `(G, N)` each; None for the first new token.
        pruned: p, the share of the visual tokens that is left out; at least one stays, the rest is rounded down.
        threshold: cosine from which on nothing is chosen anew.
        authors: all tokens are attended to where nothing is chosen anew, as in the released code.

    Returns:
        The choice; ties go to the lowest index. `O(N log N)`, no host sync.
    """
    paid = torch.where(real, paid.to(torch.promote_types(paid.dtype, torch.float32)), 0)
    count = real.sum(1)
    best = topk_mask(paid, real, (count.double() * (1 - pruned)).long().clamp_min(1))
    if before is None:
        return Chosen(best, paid.new_zeros(len(paid)), torch.ones_like(count, dtype=torch.bool))
    similarity = F.cosine_similarity(paid, torch.where(real, before[0].to(paid.dtype), 0), dim=1)
    anew = similarity < threshold
    return Chosen(torch.where(anew[:, None], best, real if authors else before[1]), similarity, anew)


def select_attended(view: View, row: Tensor, pruned: float, threshold: float = 0.9, authors: bool = False) -> Selection:
    """Returns the choice for the View of a step at new tokens, and notes it for the next one; `row (G, N)` is what the token pays."""
    before = (view.memory[PAID], view.memory[CHOSEN]) if PAID in view.memory else None
    chosen = attended_tokens(row, view.real, before, pruned, threshold, authors)
    view.memory[PAID], view.memory[CHOSEN] = row, chosen.keep
    return Selection(keep=chosen.keep)
