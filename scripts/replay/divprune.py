"""DivPrune vectors: `tokens (N, D)` -> the seed's scores, the picks in order and the kept tokens."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index, same_value
from vtr.methods.divprune import divprune, divprune_picks
from vtr.types import Budget


def replay(vector: Vector) -> None:
    if not vector.has("tokens", "selected_order", "kept_sorted"):
        raise vector.unknown_schema()
    tokens, order, kept = vector["tokens"], vector["selected_order"], vector["kept_sorted"]
    n, count = len(tokens), len(order)
    ratio = vector.param("ratio", None)
    if ratio is not None and round(ratio * n) >= 1:
        same_value("keep", Budget(keep_ratio=ratio).resolve(n), count)
    real = torch.ones(1, n, dtype=torch.bool)
    repeats = len(order.unique()) < count  # only duplicates were left: the authors' code goes on picking them
    picks, nearest_other = divprune_picks(tokens[None], real, count, repeat=repeats)
    if vector.has("first_score"):
        close("first_score", nearest_other[0], vector["first_score"])
    same_index("selected_order", picks[0], order)
    same_index("kept_sorted", picks[0].sort().values, kept)
    if not repeats:
        mask = divprune(tokens[None], real, torch.tensor([count]), count)
        same_index("keep mask", mask[0].nonzero()[:, 0], kept)
