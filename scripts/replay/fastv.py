"""FastV vectors: the last token's attention row and the hidden states of a sequence -> what layer K receives."""

from __future__ import annotations

from itertools import pairwise

import torch

from scripts.replay import Vector, close, same_index, same_value
from vtr.methods.fastv import fastv_score
from vtr.ops.gather import compaction, take
from vtr.ops.topk import topk_mask
from vtr.types import Budget


def replay(vector: Vector) -> None:
    if not vector.has("attn_last_query", "hidden_states", "keep_index"):
        raise vector.unknown_schema()
    attention, hidden = vector["attn_last_query"], vector["hidden_states"]
    start, n, length = vector.param("image_start"), vector.param("image_length"), len(hidden)
    span = slice(start, start + n)
    count = vector.param("keep", len(vector["keep_index"]) - (length - n))
    removed = vector.param("R", None)
    if removed is not None and round((1 - removed) * n) >= 1:
        same_value("keep", Budget(keep_ratio=1 - removed).resolve(n), count)

    score = fastv_score(attention[None, :, span])  # (1, N)
    if vector.has("image_scores"):
        close("image_scores", score[0], vector["image_scores"])
    real = torch.ones(1, n, dtype=torch.bool)
    visual = topk_mask(score, real, torch.tensor([count]))
    keep = torch.ones(1, length, dtype=torch.bool)
    keep[:, span] = visual
    index, _ = compaction(keep)
    same_index("keep_index", index[0], vector["keep_index"])
    if vector.has("kept_hidden"):
        close("kept_hidden", take(hidden[None], index)[0], vector["kept_hidden"])
    if vector.has("position_ids"):
        same_index("position_ids", take(torch.arange(length)[None], index)[0], vector["position_ids"].flatten())
    if vector.has("topk_index_by_score"):
        best_first = [topk_mask(score, real, torch.tensor([k])) for k in range(count + 1)]  # what each further unit of budget adds
        order = [int((more & ~fewer).nonzero()[0, 1]) + start for fewer, more in pairwise(best_first)]
        same_index("topk_index_by_score", torch.tensor(order, dtype=torch.int64), vector["topk_index_by_score"])
