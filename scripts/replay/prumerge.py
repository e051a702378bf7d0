"""PruMerge and PruMerge+ vectors (authors' code): CLS query, keys and features with CLS at 0 -> attention, kept tokens, merged tokens."""

from __future__ import annotations

from typing import Literal

import torch

from scripts.replay import Vector, close, same_index, same_value
from vtr.methods._prumerge import authors_index, authors_tokens, merge_chosen, outliers
from vtr.methods.prumerge import prumerge
from vtr.methods.prumerge_plus import prumerge_plus
from vtr.ops.gather import take


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
