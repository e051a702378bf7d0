"""DyCoke's vectors of new tokens (authors' code): attention of each -> its likeness to the one before, and the keys attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods._dycoke_dp import attended_tokens


def replay_new_tokens(vector: Vector) -> None:
    """Replays a vector with `attn_0`, `keep_0`, ... of one new token after the other."""
    start, length = int(vector.param("image_token_start_index")), int(vector.param("image_token_length"))
    pruned, threshold = float(vector.param("dycoke_p")), float(vector.param("similarity_threshold"))
    before: tuple[Tensor, Tensor] | None = None
    similarity, anew = [], []
    for step in range(len(vector["similarity"])):
        row = vector[f"attn_{step}"][:, :, 0].mean(1)  # (1, keys)
        paid = row[:, start : start + length]
        chosen = attended_tokens(paid, torch.ones_like(paid, dtype=torch.bool), before, pruned, threshold, authors=True)
        before = paid, chosen.keep
        similarity.append(chosen.similarity)
        anew.append(chosen.anew)
        keys = torch.ones(row.shape[1], dtype=torch.bool)
        keys[start : start + length] = chosen.keep[0]
        kept = keys.nonzero()[:, 0]
        same_index(f"keep_{step}", kept if chosen.anew[0] else kept[:0], vector[f"keep_{step}"])
    close("similarity", torch.cat(similarity), vector["similarity"])
    same_index("pruned", torch.cat(anew), vector["pruned"])
