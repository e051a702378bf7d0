"""CenterCLIP: cluster the tokens of a segment in the middle of the vision tower and keep the medoids.

Paper: Zhao et al., SIGIR 2022, arXiv 2205.00823.
Code:  github.com/mzhaoshuai/CenterCLIP at 886fe73, CC BY-NC: nothing copied, written from a description and checked against its outputs.
Stage: tower (or boundary). Reads: the tokens. Batch: any. Deterministic: yes.

1. The tokens of a segment are clustered at the input of one block: on images a segment is one view (at the boundary the whole image).
2. k-medoids++: the start is the token of largest norm, then always the one farthest from all picked; then tokens join the nearest medoid and
   medoids move to the member with the smallest sum of distances, until nothing moves.
3. The medoids stay, in their order; with `aggregation="mean"` each becomes the mean of its cluster.
4. Spectral variant: k-medoids++ on the rows of the K lowest eigenvectors of the normalised Laplacian of a nearest-neighbour graph.

Paper to code: B_a - S, K -> layer = a, one segment, keep; sigma -> sigma, knn_k -> neighbours.
Departures: distances are symmetric, with a zero diagonal, in float64, where the code's matrix product leaves noise that decides exact ties
(clusters of two always tie). The spectral start is the row of largest norm before normalising, which is what decides it in the code too. The
published models are fine-tuned with the clustering in place and are made for video; here it is training-free, on images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.canvas import on_device
from vtr.ops.density_peaks import cluster_means
from vtr.ops.distances import cosine, euclidean
from vtr.ops.gather import index_to_mask
from vtr.ops.kmedoids import Medoids, kmedoids
from vtr.ops.spectral import heat_affinity, laplacian_eigen
from vtr.registry import register_method
from vtr.types import (
    Boundary,
    Budget,
    Card,
    FrameOption,
    Geometry,
    Merge,
    Method,
    Place,
    Remove,
    Selection,
    Stage,
    Step,
    Tower,
    View,
    at_least,
)

CHOICES = {
    "stage": ("tower", "boundary"),
    "algorithm": ("kmedoids", "spectral"),
    "distance": ("euclidean", "cosine"),
    "aggregation": ("none", "mean"),
}


def centerclip(tokens: Tensor, real: Tensor, keep: Tensor, most: int, distance: str = "euclidean", iterations: int = 100) -> Medoids:
    """k-medoids++ of `tokens (G, N, D)`.

    Args:
        tokens: any float dtype; computed in float64.
        real: `(G, N)` bool.
        keep: `(G,)` int64, clusters.
        most: `keep.max()` or more, as a Python int.
        distance: `euclidean` or `cosine`.
        iterations: how often medoids may move.
    """
    between = euclidean(tokens) if distance == "euclidean" else cosine(tokens)
    return kmedoids(between, torch.linalg.vector_norm(tokens.double(), dim=-1), real, keep, most, iterations)


def automatic_neighbours(patches: int, frames: int = 1) -> int:
    """The code's size of the neighbourhood for segments of `frames` frames of `patches` patches."""
    return 5 * frames if patches < 100 else 5 * frames + 5


def spectral(
    tokens: Tensor, real: Tensor, keep: Tensor, most: int, neighbours: Tensor | None, sigma: float = 2.0, iterations: int = 100
) -> Medoids:
    """The spectral variant; arguments as for `centerclip`, `neighbours` and `sigma` as for `heat_affinity`."""
    _, vectors = laplacian_eigen(heat_affinity(tokens, real, sigma, neighbours), real)
    lowest = torch.arange(min(most, vectors.shape[2]), device=tokens.device) < keep[:, None]
    rows = torch.where(lowest[:, None], vectors[..., : lowest.shape[1]], 0)  # (G, N, K)
    norm = torch.linalg.vector_norm(rows, dim=-1)
    return kmedoids(euclidean(rows / (norm[..., None] + 1e-6)), norm, real, keep, most, iterations)


@register_method("centerclip")
@dataclass(frozen=True, kw_only=True)
class CenterCLIP(Method):
    """k-medoids++ at half of the tower's depth; the default budget is the paper's 49 of 147."""

    stage: Literal["tower", "boundary"] = "tower"
    layer: int | None = None
    algorithm: Literal["kmedoids", "spectral"] = "kmedoids"
    distance: Literal["euclidean", "cosine"] = "euclidean"
    aggregation: Literal["none", "mean"] = "none"
    sigma: float = 2.0
    neighbours: int | None = None
    iterations: int = 20

    stages: ClassVar[tuple[Stage, ...]] = ("tower", "boundary")
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    card: ClassVar[Card] = Card(
        title="CenterCLIP: Token Clustering for Efficient Text-Video Retrieval",
        paper="Zhao et al., 2022",
        venue="SIGIR 2022",
        arxiv="2205.00823",
        code="github.com/mzhaoshuai/CenterCLIP (CC BY-NC, not used)",
        signals="tokens at the input of one tower layer",
        cost="N x N distances once and `iterations` passes over them, per view; spectral: one N x N eigendecomposition",
        settings={
            "stage": "tower: every view is a segment; boundary: the whole image is one, behind the projector",
            "layer": "tower layer from whose input on tokens are gone; None: half of the tower's layers, as the paper's seventh block of twelve",
            "algorithm": "kmedoids, or spectral: the same on a spectral embedding",
            "distance": "euclidean or cosine (of kmedoids)",
            "aggregation": "none: medoids as they are; mean: the mean of their clusters",
            "sigma": "width of the spectral variant's affinity",
            "neighbours": "of the spectral variant's graph; None: 5 for views of less than 100 tokens, else 10",
            "iterations": "how often medoids may move; all are run, what has converged (usually by the fifth) stays; the paper stops at 100",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"centerclip: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"centerclip: layer must be 0 or more, got {self.layer}")
        if not self.sigma > 0 or self.iterations < 0:
            raise ValueError(f"centerclip: sigma must be above 0 and iterations at least 0, got {self.sigma} and {self.iterations}")
        at_least(self, "neighbours", 1)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        layer = min(geometry.tower_layers // 2, geometry.feature_layer) if self.layer is None else self.layer
        where: Place = Boundary() if self.stage == "boundary" else Tower(layer)
        per: Literal["image", "view"] = "image" if self.stage == "boundary" else "view"
        if self.aggregation == "none":
            return (Remove(where, self._select, per=per),)
        return (Merge(where, self._select, per=per, proportional=False),)

    def _select(self, view: View) -> Selection:
        n = view.real.shape[1]
        if self.algorithm == "spectral":
            own = [[view.grid(group)] if self.stage == "tower" else grids for group, grids in enumerate(view.grids)]
            each = [[self.neighbours or automatic_neighbours(max(r * c for r, c in grids), len(grids))] for grids in own]
            neighbours = on_device(each, view.tokens.device)[:, 0]
            found = spectral(view.tokens, view.real, view.keep, view.most, neighbours, self.sigma, self.iterations)
        else:
            found = centerclip(view.tokens, view.real, view.keep, view.most, self.distance, self.iterations)
        keep = index_to_mask(found.medoid, found.real, n)
        if self.aggregation == "none":
            return Selection(keep=keep)
        cluster = torch.where(view.real & (view.keep > 0)[:, None], found.cluster, -1)
        mean = cluster_means(view.tokens, cluster, found.medoid.shape[1]).to(view.tokens.dtype)
        spot = torch.where(found.real, found.medoid, n)
        tokens = torch.cat([view.tokens, view.tokens[:, :1]], 1).scatter(1, spot[..., None].expand_as(mean), mean)[:, :-1]
        assign = torch.where(cluster >= 0, found.medoid.gather(1, cluster.clamp_min(0)), -1)
        return Selection(keep=keep, tokens=tokens, assign=assign)
