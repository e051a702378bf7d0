"""Vectors `sparsevlm-v2-*` (authors' code): raters, corrected scores and the sequence behind one layer."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from scripts.replay.sparsevlm import rating
from vtr.methods.sparsevlm_plus import corrected_score, gravity
from vtr.ops.gather import compaction
from vtr.ops.topk import topk_mask


def replay(vector: Vector) -> None:
    if not vector.has("embeds", "attn_text_rows", "keep_mask"):
        raise vector.unknown_schema()
    span, by = rating(vector)
    rows, output = vector["attn_text_rows"][:, :, span], vector["layer_output"]
    real = torch.ones(1, rows.shape[2], dtype=torch.bool)
    position = torch.arange(len(output))[None]
    pull = gravity(position[:, span.stop :], position[:, span], vector.param("head_dim"), vector.param("rope_base", 10000))
    score = corrected_score(rows[None], by, real, pull, vector.param("selected_heads", 14))
    close("visual_score", score[0], vector["visual_score"])
    keep = topk_mask(score, real, torch.tensor([vector.param("keep")]))
    same_index("keep_mask", keep[0], vector["keep_mask"])
    whole = torch.ones(1, len(output), dtype=torch.bool)
    whole[:, span] = keep
    index, _ = compaction(whole)
    close("new_hidden", output[index[0]], vector["new_hidden"])
    same_index("new_position_ids", position[0, index[0]], vector["new_position_ids"].flatten())
