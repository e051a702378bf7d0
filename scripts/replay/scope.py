"""SCOPE vectors (authors' code): features and per-head CLS attention -> saliency, picks in order with their scores, kept tokens."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods.scope import Combined, scope, scope_picks


def replay(vector: Vector) -> None:
    if not vector.has("features", "cls_attention", "selected_order", "kept_sorted"):
        raise vector.unknown_schema()
    features, order = vector["features"], vector["selected_order"]
    saliency = vector["cls_attention"][..., 1:].sum(1)
    if vector.has("saliency"):
        close("saliency", saliency, vector["saliency"])
    real, most, alpha = torch.ones_like(saliency, dtype=torch.bool), order.shape[1], float(vector.param("alpha", 1.0))
    combined: Combined = "add" if vector.param("combined", "multi") == "add" else "multiply"
    picks, scores = scope_picks(features, saliency, real, most, alpha, combined)
    same_index("selected_order", picks, order)
    if vector.has("gain"):
        close("gain", scores, vector["gain"], atol=1e-4)
    keep = scope(features, saliency, real, torch.full((len(order),), most), most, alpha, combined)
    same_index("kept_sorted", keep.nonzero()[:, 1].view_as(order), vector["kept_sorted"])
