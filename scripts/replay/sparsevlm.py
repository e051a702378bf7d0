"""Vectors `sparsevlm-v1-*` and `sparsevlm-cluster-*` (authors' code): raters, scores, recycling and the sequence behind one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index, same_value
from vtr.methods.sparsevlm import recycle, recycled_counts
from vtr.ops.density_peaks import cluster_means, density_peaks
from vtr.ops.raters import rated, rater_score, raters


def replay(vector: Vector) -> None:
    if vector.has("x", "density_noise", "merged"):
        _cluster(vector)
    elif vector.has("embeds", "attn_text_rows", "cluster_input"):
        _stage(vector)
    else:
        raise vector.unknown_schema()


def _cluster(vector: Vector) -> None:
    x, clusters = vector["x"], vector.param("cluster_num")
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    number, neighbours = (torch.full((len(x),), k) for k in (clusters, vector.param("knn_k", clusters)))
    found = density_peaks(x, real, number, clusters, neighbours, vector["density_noise"])
    close("merged", cluster_means(x, found.cluster, clusters, 1e-6), vector["merged"])


def rating(vector: Vector) -> tuple[slice, Tensor]:
    """Compares the raters of a vector; returns the span of the visual tokens and the raters `(1, M)` bool."""
    embeds, start, n = vector["embeds"], vector.param("v_token_start"), vector.param("n_visual")
    span = slice(start, start + n)
    asked = torch.ones(1, len(embeds) - start - n, dtype=torch.bool)
    score = rater_score(embeds[span][None], embeds[start + n :][None], torch.ones(1, n, dtype=torch.bool), asked)
    close("rater_score", score[0], vector["rater_score"])
    by = raters(score, asked)
    same_index("rater_index", by[0].nonzero().flatten(), vector["rater_index"])
    return span, by


def _stage(vector: Vector) -> None:
    span, by = rating(vector)
    rows, output = vector["attn_text_rows"][:, :, span], vector["layer_output"]
    n, keep = rows.shape[2], vector.param("keep")
    score = rated(rows.mean(0)[None], by)
    close("visual_score", score[0], vector["visual_score"])
    real = torch.ones(1, n, dtype=torch.bool)
    recycled, clusters = recycled_counts(torch.tensor([n - keep]))
    same_value("cluster_num", int(clusters), vector.param("cluster_num"))
    tokens, noise = output[span][None], vector["density_noise"][None]
    found = recycle(tokens, score, real, torch.tensor([keep]), clusters, int(recycled), int(clusters), noise)
    same_index("keep_mask", found.keep[0], vector["keep_mask"])
    pruned = (~found.keep[0]).nonzero().flatten()
    same_index("recycled_index_in_pruned", torch.searchsorted(pruned, found.recycled[0]), vector["recycled_index_in_pruned"])
    close("cluster_input", tokens[0, found.recycled[0]], vector["cluster_input"])
    close("merged", found.merged[0], vector["merged"])
    sequence = torch.cat([output[: span.start], tokens[0, found.keep[0]], found.merged[0].to(output.dtype), output[span.stop :]])
    close("new_hidden", sequence, vector["new_hidden"])
    same_index("new_position_ids", torch.arange(len(sequence)), vector["new_position_ids"].flatten())
