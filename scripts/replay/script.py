"""Vectors `script-*` (authors' code): graph scores, relevance, the released order and the exact one that the code computes and discards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.ops.dpp import greedy_dpp, min_max
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


def chosen_segments(image: Tensor, text: Tensor, ratio: float = 0.5) -> Tensor:
    """Released: which of the M text segments `(M, C)` count for each image `(B, N, C)`: `(B, M)` bool, the best `max(1, int(ratio M))`."""
    fit = (image.float() @ text.float().T).mean(1)  # (B, M)
    low, high = fit.amin(1, keepdim=True), fit.amax(1, keepdim=True)
    scaled = (fit - low) / (high - low + 1e-6)
    count = torch.full((len(image),), max(1, int(ratio * len(text))), device=image.device)
    return topk_mask(scaled, torch.ones_like(scaled, dtype=torch.bool), count)


def released_relevance(image: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
    """Released: minus the mean raw product of CLIP's image `(B, N, C)` and chosen text `(M, C)` embeddings, min-max per image, `(B, N)`."""
    products = image.float() @ text.float().T  # (B, N, M)
    mean = torch.where(chosen[:, None], products, 0).sum(2) / chosen.sum(1)[:, None]
    return min_max(-mean, torch.ones_like(mean, dtype=torch.bool), floor=0.0, ceiling=1e-6)


def released_order(tokens: Tensor, quality: Tensor, real: Tensor, most: int) -> Tensor:
    """Released: a one-shot redundancy penalty where a determinantal point process was meant.

    Pick after pick, the token with the largest `d`, at first `quality^2`; unless that is <= 0, every `d` loses the square of its kernel entry with
    the pick over `sqrt(d) + 1e-6`. The kernel is never reduced by earlier picks.

    Args:
        tokens: `(G, N, D)`.
        quality: `(G, N)`.
        real: `(G, N)` bool.
        most: number of picks.

    Returns:
        `(G, most)` int64, distinct. Ties: lowest index. `O(most N D)`, no host sync.
    """
    unit = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1, eps=1e-12)
    quality = quality.to(unit.dtype)
    group = torch.arange(len(unit), device=unit.device)
    d = quality.square() * unit.square().sum(-1)
    free = real.clone()
    order = torch.empty(len(unit), most, dtype=torch.int64, device=unit.device)
    for count in range(most):
        pick = d.masked_fill(~free, -torch.inf).argmax(1)
        order[:, count] = pick
        free.scatter_(1, pick[:, None], False)
        best = d[group, pick][:, None]
        cosine = torch.bmm(unit, unit[group, pick, :, None].expand(-1, -1, 2))[..., 0]
        penalty = quality * cosine * quality[group, pick, None] / (best.clamp_min(0).sqrt() + 1e-6)
        d = torch.where(best > 0, d - penalty.square(), d)
    return order
