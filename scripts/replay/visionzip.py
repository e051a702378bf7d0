"""VisionZip vectors (authors' code): CLS attention, keys and features with CLS at 0 -> dominant indices, tokens, an AnyRes packing."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods.visionzip import authors_order, authors_packed, visionzip
from vtr.ops.gather import index_to_mask


def replay(vector: Vector) -> None:
    if not vector.has("cls_attention", "hidden_states", "key_metric", "tokens"):
        raise vector.unknown_schema()
    hidden, patches = vector["hidden_states"], vector["hidden_states"][:, 1:]
    score = vector["cls_attention"].sum(1)[:, 1:]
    dominant, contextual = int(vector.param("dominant")) - 1, int(vector.param("contextual"))  # CLS is not counted here
    batch = len(hidden)
    keep = torch.full((batch,), dominant + contextual)
    real = torch.ones_like(score, dtype=torch.bool)
    kept, values, _ = visionzip(patches, vector["key_metric"][:, 1:], score, real, keep, torch.full_like(keep, contextual), contextual)

    by_score = 1 + score.argsort(dim=1, descending=True, stable=True)[:, :dominant]
    cls = torch.zeros(batch, 1, dtype=torch.int64)
    pivot = kept & ~index_to_mask(by_score - 1, None, score.shape[1])
    order = torch.stack([authors_order(*row) for row in zip(kept, pivot, strict=True)])
    if vector.has("dominant_index"):
        same_index("dominant_index", torch.cat([cls, by_score], 1), vector["dominant_index"])
    if vector.has("dominant_index_sorted"):
        same_index("dominant_index_sorted", torch.cat([cls, 1 + order[:, :dominant]], 1), vector["dominant_index_sorted"])
    tokens = torch.cat([hidden[:, :1], values.gather(1, order[..., None].expand(-1, -1, hidden.shape[2]))], 1)
    close("tokens", tokens, vector["tokens"])
    if vector.has("packed"):
        width, height = vector.param("grid_width_height")
        side = round(score.shape[1] ** 0.5)
        packed = authors_packed(order[:, :dominant], contextual, (height, width), (side, side))
        close("packed", torch.stack([tokens[view, place] for view, place in packed]), vector["packed"])
