"""Vectors `dart-*` (authors' code): pivots, their visiting order, and the tokens retained, as absolute sequence positions."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, same_index
from vtr.methods.dart import dart, l1_norm, strongest
from vtr.ops.gather import index_to_mask


def replay(vector: Vector) -> None:
    if not vector.has("hidden_normed", "key_states", "retained"):
        raise vector.unknown_schema()
    tokens, keys = vector["hidden_normed"], vector["key_states"]  # (S, D), (H, S, d)
    start, length = vector.param("image_start"), vector.param("image_length")
    at = torch.arange(len(tokens))
    visual, text = (at >= start) & (at < start + length), at >= start + length
    strength = l1_norm(keys.transpose(0, 1).flatten(1))

    pivots = []
    for name, among in (("pivot_image", visual), ("pivot_text", text)):
        number = vector.param(name)
        index, real = strongest(strength[None], among[None], torch.tensor([number]), number)
        found = index[real]
        found = found[strength[found].argsort(descending=True, stable=True)]
        same_index(name, found, vector[name])
        pivots.append(found)
    positions = torch.cat(pivots)
    order = positions[authors_order(positions[None])[0]]
    same_index("pivot_visit_order", order, vector["pivot_visit_order"])

    quota = vector.param("tokens_per_pivot", None)
    if quota is None:
        variant = vector.param("variant")
        keep = vector.param("retain_token_num_for_llava_next" if variant == "llava_next" else "max_num_trunction", None)
        quota = authors_quota(variant, length, len(positions), keep, vector.param("reduction_ratio", None))
    stays = index_to_mask(pivots[0][None], None, len(tokens))
    taken = dart(tokens[None], visual[None] & ~stays, tokens[order][None], torch.full((1, len(order)), quota))
    retained = (stays | taken)[0]
    same_index("retained", retained.nonzero().flatten(), vector["retained"])
    same_index("keep_all", (retained | ~visual).nonzero().flatten(), vector["keep_all"])


def authors_quota(variant: str, length: int, pivots: int, keep: int | None = None, ratio: float | None = None) -> int:
    """Tokens per pivot in the released code: `llava` and `llava_next` by count, `qwen` (and `llava` without a count) by ratio pruned."""
    if variant == "llava_next" and keep is not None:
        return min(keep, length - 4) // pivots
    if variant == "llava" and keep is not None:
        return keep // pivots
    return int(length * (1 - (ratio or 0.0)) / pivots)


def authors_order(positions: Tensor) -> Tensor:
    """Returns the released code's order of pivots: that of a Python set of their sequence positions. `(G, P)` int64 -> `(G, P)`."""
    visited = [[row.index(p) for p in set(row)] for row in positions.tolist()]
    return torch.tensor(visited, dtype=torch.int64, device=positions.device)
