"""V2Drop vectors (authors' code): hidden states in front of a layer and of the one before -> variations, survivors and positions per stage."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index, same_value
from vtr.methods.v2drop import v2drop, variation


def replay(vector: Vector) -> None:
    if not vector.has("hidden_prev_0", "hidden_in_0", "keep_index_0"):
        raise vector.unknown_schema()
    start, ratios = vector.param("image_start"), vector.param("keep_ratio")
    positions = None
    for stage, ratio in enumerate(ratios):
        before, now = vector[f"hidden_prev_{stage}"], vector[f"hidden_in_{stage}"]
        number, left = vector[f"image_tokens_{stage}"].tolist()
        image = slice(start, start + number)
        made, want = variation(before[:, image], now[:, image]), vector[f"variation_{stage}"]
        close("variation", made if want.ndim == 2 else made[0], want)
        keep = max(1, int(number * ratio))
        same_value("image tokens left", keep, left)
        kept = torch.ones(now.shape[1], dtype=torch.bool)
        real = torch.ones(1, number, dtype=torch.bool)
        kept[image] = v2drop(before[:1, image], now[:1, image], real, torch.tensor([keep]))[0]  # the first prompt's ranking is that of all
        index = kept.nonzero()[:, 0]
        same_index("keep_index", index, vector[f"keep_index_{stage}"])
        close("hidden_out", now[:, index], vector[f"hidden_out_{stage}"])
        after = vector[f"position_ids_{stage}"]
        if positions is None and after.ndim == 2:
            positions = torch.arange(now.shape[1])[None]
        if positions is not None:
            same_index("position_ids", positions[..., index], after)
        positions = after
