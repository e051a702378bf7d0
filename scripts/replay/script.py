"""Vectors `script-*` (authors' code): graph scores, relevance, the released order and the exact one that the code computes and discards."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods.script import chosen_segments, released_order, released_relevance
from vtr.ops.dpp import greedy_dpp
from vtr.ops.gather import index_to_mask
from vtr.ops.redundancy import graph_redundancy
from vtr.ops.topk import topk_mask


def replay(vector: Vector) -> None:
    if not vector.has("image_features", "image_embeds", "text_embeds", "dpp_order"):
        raise vector.unknown_schema()
    tokens, image, text = vector["image_features"], vector["image_embeds"], vector["text_embeds"]
    batch, n = tokens.shape[:2]
    most = vector["dpp_order"].shape[1]
    real, keep = torch.ones(batch, n, dtype=torch.bool), torch.full((batch,), most)

    least, gamma = vector.param("K", 4), vector.param("gamma", 1.0)
    score, degree = graph_redundancy(tokens, real, vector.param("sim_threshold", 0.2), least, gamma)
    same_index("gsp_degree", degree, vector["gsp_degree"])
    close("gsp_score", score, vector["gsp_score"])
    same_index("gsp_mask", topk_mask(score, real, keep), vector["gsp_mask"])  # the authors keep the most redundant

    quality = released_relevance(image, text, chosen_segments(image, text))
    close("relevance", quality, vector["relevance"])
    order = released_order(tokens, quality, real, most)
    same_index("dpp_order", order, vector["dpp_order"])
    mask = index_to_mask(order, None, n)
    same_index("dpp_mask", mask, vector["dpp_mask"])
    same_index("final_mask", mask, vector["final_mask"])  # the intersection is filled up from the second module until it is that module
    if vector.has("exact_dpp_order"):
        exact = greedy_dpp(tokens, quality, real, most, jitter=1e-6)
        same_index("exact_dpp_order", exact, vector["exact_dpp_order"])
        same_index("exact_dpp_mask", index_to_mask(exact, None, n), vector["exact_dpp_mask"])
