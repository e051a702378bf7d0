"""PruMerge and PruMerge+ vectors (authors' code): CLS query, keys and features with CLS at 0 -> attention, kept tokens, merged tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index, same_value
from vtr.methods._prumerge import merge_chosen, outliers
from vtr.methods.prumerge import prumerge
from vtr.methods.prumerge_plus import prumerge_plus
from vtr.ops.gather import take
from vtr.ops.nearest_sum import add_nearest


def replay(vector: Vector) -> None:
    if not vector.has("q_cls", "k", "hidden_states", "tokens"):
        raise vector.unknown_schema()
    keys, tokens = vector["k"], vector["hidden_states"][:, 1:]
    logits = (keys @ vector["q_cls"][..., None]).squeeze(2) * keys.shape[2] ** -0.5
    attention, keys = logits.softmax(1)[:, 1:], keys[:, 1:]
    close("cls_attention", attention, vector["cls_attention"])

    everything = torch.ones_like(attention, dtype=torch.bool)
    plus, adaptive, ratio = vector.method == "prumerge_plus", bool(vector.param("adaptive")), float(vector.param("ratio"))
    if adaptive:
        found = outliers(attention.view(1, -1), everything.view(1, -1))  # over the flattened batch
        ratio = int(found.sum()) / found.numel()
        close("ratio", torch.tensor(ratio), torch.tensor(float(vector.param("ratio"))))
    top = authors_index(attention, ratio)
    same_value("n_important", top.shape[1], int(vector.param("n_important")))
    same_index("topk_index", top, vector["topk_index"])
    grid: Literal["none", "adaptive", "fixed"] = "none" if not plus else "adaptive" if adaptive else "fixed"
    index, neighbours = authors_index(attention, ratio, grid), int(vector.param("neighbours", 32))
    close("tokens", authors_tokens(tokens, keys, attention, index, neighbours), vector["tokens"])

    # what a host gets: the same tokens, in position order
    keep = None if adaptive else torch.tensor([index.shape[1] + 1])
    pair = prumerge_plus(attention, everything, keep) if plus else (prumerge(attention, everything, keep),)
    chosen = torch.stack(pair).any(0)
    alike = len(tokens) == 1 and grid != "fixed" and int(found.sum() if adaptive else top.shape[1]) == top.shape[1]
    if alike and index.shape[1] < attention.shape[1]:  # int(N * ratio) can lose one
        same_index("kept", chosen.nonzero()[:, 1], index[0].sort().values)
        merged = merge_chosen(tokens, keys, attention, everything, chosen, index.shape[1], torch.tensor([False]), neighbours)
        order = torch.cat([index[0], merged.extra.nonzero()[:, 1]])
        close("tokens of a host", take(merged.tokens, order[None]), vector["tokens"])


def authors_index(attention: Tensor, ratio: float, grid: Literal["none", "adaptive", "fixed"] = "none") -> Tensor:
    """Returns the released code's index `(B, K)` int64 of `attention (B, N)`: top first, then the grid of PruMerge+, which ends before 575.

    `adaptive` leaves out grid points that are in already (one image); `fixed` does not, so that an index may stand twice.
    """
    n = attention.shape[1]
    top = attention.argsort(dim=1, descending=True, stable=True)[:, : int(n * ratio)]
    if grid == "none":
        return top
    step = int(1 / ratio)
    if grid == "fixed":
        return torch.cat([top, torch.arange(step // 2, 575, step).expand(len(top), -1)], 1)
    points = torch.arange(0, 575, int(step / 3))
    return torch.cat([top, points[~torch.isin(points, top)].expand(len(top), -1)], 1)


def authors_tokens(tokens: Tensor, keys: Tensor, attention: Tensor, index: Tensor, neighbours: int = 32) -> Tensor:
    """Returns the released code's tokens `(B, K + 1, D)` for its `index (B, K)`: in that order, then the extra one.

    Where entries of `index` repeat, a token can take in itself, and the first few of the others are nowhere.
    """
    number = index.shape[1]
    inside = torch.zeros(attention.shape, dtype=torch.bool).scatter_(1, index, True)
    others = inside.to(torch.uint8).argsort(dim=1, stable=True)  # ascending, then those inside
    lost = number - inside.sum(1, keepdim=True)
    others = others.gather(1, (torch.arange(attention.shape[1] - number) + lost).clamp_max(attention.shape[1] - 1))
    columns = torch.cat([index, others], 1)
    tokens, keys, attention = take(tokens, columns), take(keys, columns), attention.gather(1, columns)
    own = torch.arange(number).expand(len(index), -1)
    grown = add_nearest(tokens, keys, attention, own, torch.ones_like(attention, dtype=torch.bool), neighbours)
    return torch.cat([grown, attention[:, None, number:] @ tokens[:, number:]], 1)
