"""Vectors `todre-*` (float64 reference of our own): stage 1 for one image, AnyRes and video; the decision of stage 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.todre import cls_pivot, cross_attention_shares, todre
from vtr.ops.maxsum import greedy_max_sum


def replay(vector: Vector) -> None:
    if vector.has("tokens", "cls_attention", "selected_order"):
        _stage1(vector)
    elif vector.has("attention", "labels"):
        _stage2(vector)
    else:
        raise vector.unknown_schema()


def _stage1(vector: Vector) -> None:
    tokens, order = vector["tokens"].double(), vector["selected_order"]  # as the reference
    real = torch.ones(1, len(tokens), dtype=torch.bool)
    scored = vector["cls_attention"].flatten()  # a video's (frames, tokens) in sequence order
    attention = F.pad(scored, (0, len(tokens) - len(scored)))[None]
    thumbnail = (torch.arange(len(tokens)) < len(scored))[None]
    pivot = cls_pivot(attention, real, thumbnail)
    same_index("pivot", pivot, order[:1])
    got = greedy_max_sum(tokens[None], real, pivot, len(order))[0]
    same_index("selected_order", got, order)
    kept = todre(tokens[None], real, torch.tensor([len(order)]), len(order), pivot)[0]
    same_index("selected_sorted", kept.nonzero().flatten(), vector["selected_sorted"])
    close("cumulative_similarity_at_pick", _similarity_at_pick(tokens, got), vector["cumulative_similarity_at_pick"])


def _similarity_at_pick(tokens: Tensor, order: Tensor) -> Tensor:
    """Returns the sum of similarities of each pick to the earlier ones; NaN for the first."""
    unit = F.normalize(tokens.double(), dim=-1, eps=1e-12)[order]
    total = (unit @ unit.T).tril(-1).sum(1)
    total[0] = torch.nan
    return total


def _stage2(vector: Vector) -> None:
    attention, label = vector["attention"].double().mean(0), vector["labels"]  # (S, S)
    visual, text = label == 1, label == 2
    t2v, v2t = cross_attention_shares(
        attention[text][:, visual][None],
        attention[visual][:, text][None],
        torch.ones(1, int(visual.sum()), dtype=torch.bool),
        torch.ones(1, int(text.sum()), dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
    )
    close("alpha_t2v", t2v[0], vector["alpha_t2v"])
    close("alpha_v2t", v2t[0], vector["alpha_v2t"])
    tau = vector.param("tau", 0.1)
    same_index("drop", (t2v < tau) & (v2t < tau), vector["drop"].view(1))
