"""VisPruner vectors (authors' code): features and per-head CLS attention -> kept tokens."""

from __future__ import annotations

import torch

from scripts.replay import Vector, same_index
from vtr.methods.vispruner import vispruner
from vtr.ops.gather import compaction


def replay(vector: Vector) -> None:
    if not vector.has("features", "cls_attention", "index_mask"):
        raise vector.unknown_schema()
    score, mask = vector["cls_attention"].mean(1), vector["index_mask"]
    number, n = int(vector.param("T")), mask.shape[1]
    ratio = float(vector.param("important_ratio", 0.5))
    keep = torch.full((len(mask),), number)
    kept = vispruner(vector["features"], score, torch.ones_like(mask), keep, n - number, ratio)
    same_index("index_mask", kept, mask)
    if vector.has("kept_index"):
        same_index("kept_index", compaction(kept)[0], vector["kept_index"])
