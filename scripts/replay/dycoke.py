"""DyCoke vectors (authors' code): features of a video -> tokens kept, in the authors' order; attention of new tokens -> keys attended to."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods.dycoke import attended, dycoke_authors


def replay(vector: Vector) -> None:
    if vector.has("features", "indices", "out"):
        _boundary(vector)
    elif vector.has("attn_0", "keep_0", "similarity", "pruned"):
        _decode(vector)
    else:
        raise vector.unknown_schema()


def _boundary(vector: Vector) -> None:
    features = vector["features"]
    tokens = features.unflatten(0, (int(vector.param("num_frames")), int(vector.param("num_tokens_per_frame"))))
    frames, real = len(tokens), torch.ones(1, *tokens.shape[:2], dtype=torch.bool)
    order, kept = dycoke_authors(tokens[None], real, [frames], float(vector.param("merging_ratio")))
    index = order[0, : int(kept.sum())]
    same_index("indices", index, vector["indices"])
    close("out", features[index], vector["out"])


def _decode(vector: Vector) -> None:
    start, length = int(vector.param("image_token_start_index")), int(vector.param("image_token_length"))
    keep = torch.tensor([int(length * (1 - float(vector.param("dycoke_p"))))])
    real, before = torch.ones(1, length, dtype=torch.bool), None
    for step, (similar, moved) in enumerate(zip(vector["similarity"], vector["pruned"], strict=True)):
        row = vector[f"attn_{step}"][0, :, 0].mean(0)
        visual = row[None, start : start + length]
        threshold = float(vector.param("similarity_threshold"))
        mask, similarity = attended(visual, before, real, keep, threshold)
        close(f"similarity {step}", similarity[0], similar)
        same_index(f"pruned {step}", similarity[0] < threshold, moved)
        keys = torch.ones(len(row), dtype=torch.bool)
        keys[start : start + length] = mask[0]
        same_index(f"keep {step}", keys.nonzero()[:, 0] if moved else torch.empty(0, dtype=torch.int64), vector[f"keep_{step}"])
        before = visual
