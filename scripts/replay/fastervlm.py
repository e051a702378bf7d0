"""Vectors `vispruner-fastervlm-*` (authors' code): per-head CLS attention -> score and kept tokens."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods.fastervlm import fastervlm_score
from vtr.ops.gather import compaction
from vtr.ops.topk import topk_mask


def replay(vector: Vector) -> None:
    if not vector.has("cls_attention", "index_mask"):
        raise vector.unknown_schema()
    attention, mask = vector["cls_attention"], vector["index_mask"]
    score, number = fastervlm_score(attention), int(vector.param("T"))
    if vector.has("score"):
        close("score", score, vector["score"])
    keep = topk_mask(score, torch.ones_like(mask), torch.full((len(mask),), number))
    same_index("index_mask", keep, mask)
    if vector.has("kept_index"):
        same_index("kept_index", compaction(keep)[0], vector["kept_index"])
