"""Vectors `centerclip-*` (authors' code): k-medoids, a whole block on frames, and the spectral variant."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import ReplayError, Vector, close, same_index, same_value
from vtr.methods.centerclip import automatic_neighbours, spectral
from vtr.ops.density_peaks import cluster_means
from vtr.ops.distances import cosine, euclidean
from vtr.ops.gather import take
from vtr.ops.kmedoids import Medoids, kmedoids
from vtr.ops.spectral import heat_affinity, laplacian_eigen


def replay(vector: Vector) -> None:
    if vector.has("tokens", "affinity", "medoids"):
        _spectral(vector)
    elif vector.has("tokens", "init_medoids", "medoids"):
        _kmedoids(vector)
    elif vector.has("x", "out_medoid", "medoids"):
        _block(vector)
    else:
        raise vector.unknown_schema()


def _between(vector: Vector, tokens: Tensor) -> Tensor:
    if vector.param("distance", "euclidean") == "cosine":
        return cosine(tokens)
    p = float(vector.param("norm_p", 2.0))
    return euclidean(tokens) if p == 2 else torch.cdist(tokens.double(), tokens.double(), p=p)


def _clusters(vector: Vector, tokens: Tensor, k: int) -> Medoids:
    norm = torch.linalg.vector_norm(tokens.double(), dim=-1)
    if vector.param("pre_norm", False):
        tokens = tokens / (tokens.norm(dim=-1, keepdim=True) + 1e-6)
    real = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return kmedoids(_between(vector, tokens), norm, real, torch.full((len(tokens),), k), k, vector.param("iter_limit", 100))


def _kmedoids(vector: Vector) -> None:
    tokens, k = vector["tokens"], vector["medoids"].shape[1]
    found = _clusters(vector, tokens, k)
    same_index("init_medoids", found.start, vector["init_medoids"])
    objective = _between(vector, tokens).gather(2, found.medoid[:, None].expand(-1, tokens.shape[1], -1)).amin(2).sum(1)
    if not vector.param("tie_sensitive", False):
        same_index("medoids", found.medoid, vector["medoids"])
        same_index("assignment", found.cluster, vector["assignment"])
        close("objective_fp64", objective, vector["objective_fp64"])
        return
    for got, want in zip(found.medoid.tolist(), vector["medoids"].tolist(), strict=True):  # ties decided by rounding in the authors' code
        overlap = len(set(got) & set(want)) / k
        if overlap < 0.8:
            raise ReplayError(f"medoids: overlap {overlap:.2f}, at least 0.8 expected")
    close("objective_fp64 / 2 %", objective / vector["objective_fp64"], torch.ones_like(objective), atol=0.02)
    same_value("medoids (overlap)", found.medoid.shape, vector["medoids"].shape)


def _block(vector: Vector) -> None:
    x, batch, k = vector["x"], vector.param("B"), vector.param("K")
    before, after = vector.param("frames_before"), vector.param("frames_after")
    per = before // after  # frames of a segment
    patches = x.shape[0] - 1
    frames = x.transpose(0, 1).unflatten(0, (batch * after, per))  # (B S, frames, 1 + N, D)
    tokens = frames[:, :, 1:].flatten(1, 2)
    found = _clusters(vector, tokens, k)
    same_index("medoids", found.medoid.view(batch, after, k), vector["medoids"])
    head = frames[:, :, 0].mean(1, keepdim=True)
    same_value("patches", tokens.shape[1], per * patches)
    for name, body in (("out_medoid", take(tokens, found.medoid)), ("out_mean", cluster_means(tokens, found.cluster, k).to(x.dtype))):
        close(name, torch.cat([head, body], 1).transpose(0, 1), vector[name])


def _spectral(vector: Vector) -> None:
    tokens, k = vector["tokens"], vector["medoids"].shape[1]
    real = torch.ones(tokens.shape[:2], dtype=torch.bool)
    frames, grid = vector.param("T"), vector.param("grid")
    asked, sigma = vector.param("knn_k", -1), vector.param("sigma", 2.0)
    size = asked if asked >= 5 else automatic_neighbours(grid * grid, frames)
    neighbours = torch.full((len(tokens),), size) if vector.param("mode", "KNN") == "KNN" else None
    affinity = heat_affinity(tokens, real, sigma, neighbours)
    close("affinity", affinity, vector["affinity"])
    if vector.has("eigenvalues_fp64"):
        close("eigenvalues_fp64", laplacian_eigen(affinity, real)[0], vector["eigenvalues_fp64"])
    found = spectral(tokens, real, torch.full((len(tokens),), k), k, neighbours, sigma, vector.param("iter_limit", 100))
    same_index("medoids", found.medoid, vector["medoids"])
    same_index("assignment", found.cluster, vector["assignment"])
