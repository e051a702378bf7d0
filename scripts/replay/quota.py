"""QuoTA vectors (authors' code): probabilities of frames -> weights, budgets, sizes, and the tokens of all frames."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods._quota import authors_budgets, authors_frames, authors_grid, authors_weights


def replay(vector: Vector) -> None:
    if not vector.has("tokens", "probabilities", "normalised_weights", "frame_budgets", "out_tokens"):
        raise vector.unknown_schema()
    side, version = int(vector.param("side")), vector.param("version")
    total = int(vector.param("total")) * int(vector.param("max_token"))
    weights = authors_weights(vector["probabilities"], vector.param("weight_scale")[1], None if version == "v1" else side * side / total)
    close("normalised_weights", weights, vector["normalised_weights"])
    budgets = authors_budgets(weights, total)
    same_index("frame_budgets", budgets, vector["frame_budgets"])
    frames = authors_frames(vector["tokens"].unflatten(1, (side, side)), budgets.tolist(), version)
    if version == "v3":
        same_index("frame_len", torch.tensor([len(frame) for frame in frames]), vector["frame_len"])
        close("out_tokens", torch.cat(frames), vector["out_tokens"])
        return
    same_index("frame_hw", torch.tensor([authors_grid(n) for n in budgets.tolist()]), vector["frame_hw"])
    close("out_tokens", torch.cat([frame.flatten(0, 1) for frame in frames]), vector["out_tokens"])
    newline = vector["image_newline"]
    lines = [torch.cat([frame, newline.expand(len(frame), 1, -1)], 1).flatten(0, 1) for frame in frames if len(frame)]
    close("out_tokens_with_newline", torch.cat(lines), vector["out_tokens_with_newline"])
