"""MMTok vectors (authors' code): tokens, features and text embeddings -> picks in order with their gains, kept tokens."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods.mmtok import TAU_TEXT, coverage_rows, mmtok
from vtr.ops.coverage import greedy_coverage


def replay(vector: Vector) -> None:
    if not vector.has("tokens", "features", "text_embeds", "selected_order", "kept_sorted"):
        raise vector.unknown_schema()
    tokens, features, text = vector["tokens"], vector["features"], vector["text_embeds"]
    order, kept = vector["selected_order"], vector["kept_sorted"]
    if tokens.ndim == 2:
        tokens, features, order, kept = tokens[None], features[None], order[None], kept[None]
    text = (text if text.ndim == 3 else text[None]).expand(len(tokens), -1, -1)
    real, asked = torch.ones(tokens.shape[:2], dtype=torch.bool), torch.ones(text.shape[:2], dtype=torch.bool)
    taus = float(vector.param("tau_text", TAU_TEXT)), float(vector.param("tau_vision", 0.2))
    rows = coverage_rows(tokens, features, text, real, asked, *taus, float(vector.param("alpha", 0.5)))
    first = real.clone()
    if vector.has("excluded_index"):
        first[:, vector["excluded_index"]] = False
    most = order.shape[1]
    picks, gains = greedy_coverage(rows, real, most, first=first)
    left = torch.arange(most) < first.sum(1, keepdim=True)  # then the code keeps the first token again and again
    picks = torch.where(left, picks, 0)
    same_index("selected_order", picks, order)
    if vector.has("gain"):
        gain = vector["gain"].view_as(gains)
        close("gain", torch.where(left, gains / gain.abs().amax(), 0), torch.where(left, gain / gain.abs().amax(), 0), atol=1e-4)
    same_index("kept_sorted", picks.sort().values if kept.shape == order.shape else picks.unique()[None], kept)
    if bool(left.all()):
        mask = mmtok(rows, real, torch.full((len(order),), most), most, first)
        same_index("keep mask", mask.nonzero()[:, 1].view_as(order), order.sort().values)
