"""Vectors `cdpruner-*` (authors' code): relevance scaled over the batch, kernel, picking order and mask."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods.cdpruner import cdpruner
from vtr.ops.dpp import greedy_dpp, min_max
from vtr.ops.relevance import clip_relevance


def replay(vector: Vector) -> None:
    if not vector.has("image_features", "image_embeds", "text_embeds", "selected_order"):
        raise vector.unknown_schema()
    tokens, order = vector["image_features"], vector["selected_order"]
    batch, n = tokens.shape[:2]
    real = torch.ones(batch, n, dtype=torch.bool)
    scores = clip_relevance(vector["image_embeds"], vector["text_embeds"])
    quality = min_max(scores.view(1, -1), real.view(1, -1)).view(batch, n)  # the crops of one image
    close("relevance", quality, vector["relevance"])
    if vector.has("kernel_diag"):
        close("kernel_diag", quality.square(), vector["kernel_diag"])
    most = order.shape[1]
    same_index("selected_order", greedy_dpp(tokens, quality, real, most), order)
    keep = cdpruner(tokens, quality, real, torch.full((batch,), most), most)
    same_index("index_mask", keep, vector["index_mask"])
    same_index("kept_sorted", keep.nonzero()[:, 1].view(batch, most), vector["kept_sorted"])
