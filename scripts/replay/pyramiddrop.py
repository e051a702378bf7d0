"""Vectors `pyramiddrop-*` (authors' code): hidden states in front of a layer, its norm and projections -> what the layer receives."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from scripts.replay._llama import project, rope
from vtr.methods.pyramiddrop import pyramiddrop, pyramiddrop_score
from vtr.ops.gather import left_align, take
from vtr.types import PerToken


def replay(vector: Vector) -> None:
    if not vector.has("hidden_states", "q_weight", "k_weight", "image_score0"):
        raise vector.unknown_schema()
    hidden, positions = vector["hidden_states"], vector["position_ids"]
    heads, kv_heads, base = vector.param("heads"), vector.param("kv_heads", vector.param("heads")), vector.param("rope_base", 10000)
    arguments = (hidden, vector["rms_weight"], vector.param("rms_eps", 1e-5))
    query = rope(project(*arguments, vector["q_weight"], heads), positions, base)
    key = rope(project(*arguments, vector["k_weight"], kv_heads), positions, base)
    there = vector["attention_mask"] if vector.has("attention_mask") else torch.ones(hidden.shape[:2], dtype=torch.bool)
    stage, ratios = vector.param("stage"), vector.param("ratios")

    survivors = torch.zeros_like(there)
    for b, start in enumerate(vector.param("image_positions")):
        n_in = vector.param("image_tokens_in")[b]
        if not n_in:  # a prompt without an image
            survivors[b] = there[b]
            continue
        visual = torch.arange(hidden.shape[1])
        visual = (visual >= start) & (visual < start + n_in)
        text = there[b].bool() & ~visual
        got, kept = _one(query[b], key[b], visual, text, int(vector.param("image_tokens_original")[b] * ratios[stage]))
        close(f"image_score{b}", got, vector[f"image_score{b}"])
        same_index(f"kept_in_image{b}", kept.nonzero().flatten(), vector[f"kept_in_image{b}"])
        survivors[b] = text | visual.masked_scatter(visual, kept)
    index, real = left_align(survivors, int(survivors.sum(1).max()))  # the authors pad on the right
    close("new_hidden", torch.where(real[..., None], take(hidden, index), 0), torch.where(real[..., None], vector["new_hidden"], 0))
    place = torch.arange(index.shape[1]).expand_as(index)
    same_index("new_position_ids", torch.where(real, place, 0), torch.where(real, vector["new_position_ids"], 0))
    if vector.has("new_attention_mask"):
        same_index("new_attention_mask", real, vector["new_attention_mask"])


def _one(query: Tensor, key: Tensor, visual: Tensor, text: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Returns the scores and keep mask of one sample's image tokens, `(n_in,)` each."""

    def group(states: Tensor) -> PerToken:
        return PerToken(states[visual][None], states[text][None])

    real, text_real = (torch.ones(1, int(which.sum()), dtype=torch.bool) for which in (visual, text))
    score = pyramiddrop_score(group(query), group(key), real, text_real, torch.zeros(1, dtype=torch.int64))
    return score[0], pyramiddrop(score, real, torch.tensor([keep]))[0]
