"""Expedit: run the later blocks of a vision encoder on clusters of tokens, and give the full grid back at its end.

Paper: Liang et al., NeurIPS 2022, arXiv 2210.01035.
Code:  github.com/Expedit-LargeScale-Vision-Transformer, eight repositories (Apache-2.0, MIT, CC BY-NC): nothing copied, checked against the
       outputs of Expedit-Segmenter at 63f4066 and Expedit-SAM at 75a1c30.
Stage: tower. Reads: the residual stream at two points. Batch: any. Deterministic: yes.

1. The first alpha blocks see all tokens.
2. The H x W tokens are clustered to h x w centres (`vtr.ops.clusters.cluster`): soft k-means in which a token may only join centres at
   most window // 2 cells from its own. Prefix tokens pass by.
3. The other blocks run on the centres.
4. Every token becomes the mean of the refined centres that were nearest to it at step 2, weighted by exp(-tau distance^2)
   (`vtr.ops.reconstruct`). The weights are computed once and used wherever the encoder's tokens are read.

Paper to code: alpha -> alpha, beta -> blocks, lambda or n_clusters -> grid, kappa -> iterations, tau -> tau, k -> neighbours.
Departures: weights sum to 1 instead of having Euclidean norm 1 (`compat="authors"`), which would make tokens sqrt(k) too long; tau is
calibrated to the encoder instead of one number; alpha means the same for every host: blocks at full resolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isclose
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.clusters import cell_centres, cell_pivots, cluster, hard_labels, home_cells
from vtr.ops.gather import take
from vtr.ops.grids import by_grid, together
from vtr.ops.reconstruct import are_few, mean_of_nearest, nearest, reconstruct, reconstruction
from vtr.ops.sharpness import auto_tau
from vtr.recipes import calibrated
from vtr.registry import register_method
from vtr.types import Card, FrameOption, Geometry, Merge, Method, Restore, Selection, Stage, Step, Tower, View, VtrError, at_least

FULL_SHARE = 10 / 24
"""Blocks at full resolution when alpha is not given: 10 of the 24 of ViT-L, as published for ADE20K."""
SAME_NORM = 1e-3
"""Relative difference up to which norms of patch weights are of one encoder: more than rounding to bfloat16 makes."""


@dataclass
class _Clusters:
    """What restoring needs of the groups of one grid: tokens before and centres right after clustering; weights once they are known."""

    groups: list[int]
    tokens: Tensor
    centres: Tensor
    tau: float | Tensor
    weights: Tensor | None = None
    nearest: tuple[Tensor, Tensor] | None = None
    labels: Tensor | None = None


@register_method("expedit")
@dataclass(frozen=True, kw_only=True)
class Expedit(Method):
    """Clusters at depth alpha, restores at the end. Has no budget: the grid of centres decides."""

    alpha: int | None = None
    grid: tuple[int, int] | float = 0.7
    iterations: int = 5
    window: int = 5
    tau: float | str = "auto"
    neighbours: int = 20
    blocks: int | None = None
    reconstruct: bool | Literal["naive"] = True
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("tower",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    card: ClassVar[Card] = Card(
        title="Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
        paper="Liang et al., 2022",
        venue="NeurIPS 2022",
        arxiv="2210.01035",
        code="github.com/Expedit-LargeScale-Vision-Transformer (Apache-2.0, MIT, CC BY-NC, not used)",
        signals="tokens between two blocks",
        cost="distances of every token to window^2 centres, once per iteration, and to all of them once",
        settings={
            "alpha": "blocks at full resolution, counted over the whole encoder; None: 10 of 24, as published for ViT-L",
            "grid": "(rows, cols) of clusters, or their share of each side of the token grid",
            "iterations": "of the clustering",
            "window": "odd; a token may join the clusters of window x window cells around its own",
            "tau": "sharpness of both layers; 'auto' takes that of the encoder's recipe, else calibrates to each image; or a YAML file with one",
            "neighbours": "clusters that a restored token is made of; negative: all",
            "blocks": "blocks that run on clusters; None: all after alpha",
            "reconstruct": "restore the full grid at the end; false hands the clusters to the projector, 'naive' copies the nearest cluster",
            "compat": "'authors' gives restored tokens the released code's weights of Euclidean norm 1",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        grid = self.grid
        if isinstance(grid, (list, tuple)):
            if len(grid) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in grid):
                raise ValueError(f"expedit: grid must be (rows, cols), both at least 1, got {grid!r}")
            object.__setattr__(self, "grid", tuple(grid))  # YAML and JSON hand in lists
        elif isinstance(grid, bool) or not isinstance(grid, (int, float)) or not 0 < grid <= 1:
            raise ValueError(f"expedit: grid must be (rows, cols) or a share of each side in (0, 1], got {grid!r}")
        for name, least in (("alpha", 0), ("iterations", 0), ("window", 1), ("blocks", 1)):
            at_least(self, name, least)
        if self.window % 2 == 0:
            raise ValueError(
                f"expedit: window must be odd, got {self.window}; {self.window + 1} reaches {self.window // 2} cells to every side"
            )
        if self.neighbours == 0:
            raise ValueError("expedit: neighbours must be at least 1, or negative for all clusters, got 0")
        if not isinstance(self.tau, str) and not 0 < self.tau < float("inf"):
            raise ValueError(f"expedit: tau must be above 0 and finite, got {self.tau}")
        if self.reconstruct not in (True, False, "naive"):
            raise ValueError(f"expedit: reconstruct must be true, false or 'naive', got {self.reconstruct!r}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        depth = geometry.feature_layer + 1
        alpha = round(FULL_SHARE * depth) if self.alpha is None else self.alpha
        first = geometry.first_layer
        if first and not first <= alpha < depth:
            raise ValueError(
                f"expedit: alpha={alpha} must be from {first} to {depth - 1}, the blocks of the only stage of {geometry.host} that can be "
                "clustered; alpha counts the blocks at full resolution over the whole encoder"
            )
        if alpha >= depth:
            raise ValueError(
                f"expedit: alpha={alpha} must be below the {depth} blocks whose output is used, so that some run on clusters; "
                "alpha counts the blocks at full resolution"
            )
        end = depth if self.blocks is None else alpha + self.blocks
        if end > depth:
            raise ValueError(
                f"expedit: alpha={alpha} and blocks={self.blocks} are more than the {depth} blocks whose output is used; lower one"
            )
        if not self.reconstruct and not geometry.llm_layers:
            raise VtrError(f"expedit: reconstruct=False hands clusters to an LLM, but host {geometry.host!r} has none; leave it out")
        if geometry.fixed_grid and geometry.patch_grid is not None:
            self.clusters(geometry.patch_grid)
        select = partial(_cluster, method=self, tau=self._sharpness(geometry, alpha))
        merge = Merge(Tower(alpha), select, counted=False, per="view", proportional=False, grid=self.clusters)
        if not self.reconstruct:
            return (merge,)
        return merge, Restore(Tower(end), partial(_restore, method=self), per="view")

    def _sharpness(self, geometry: Geometry, alpha: int) -> float | str:
        """Tau as a number where it is known, `auto` where each image gives its own: for `auto` that of the recipe whose encoder has this
        depth and these patch weights, if it was calibrated at this alpha, window and grid."""
        if not isinstance(self.tau, str):
            return self.tau
        if self.tau != "auto":
            return read_tau(self.tau)
        for entry in calibrated("expedit"):
            encoder = entry.get("encoder")
            if not isinstance(encoder, Mapping) or encoder.get("layers") != geometry.tower_layers or geometry.patch_norm is None:
                continue
            settings: dict[str, Any] = {name: entry.get(name) for name in ("tau", "alpha", "grid", "window")}
            stored = Expedit(**settings)
            if (stored.alpha, stored.window) != (alpha, self.window) or stored._sides(geometry) != self._sides(geometry):
                continue
            norm = geometry.patch_norm()
            if norm is not None and isclose(norm, encoder.get("patch_norm") or 0, rel_tol=SAME_NORM):
                return stored.tau
        return "auto"

    def _sides(self, geometry: Geometry) -> tuple[int, int] | float:
        return self.grid if isinstance(self.grid, tuple) or geometry.patch_grid is None else self.clusters(geometry.patch_grid)

    def clusters(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid of clusters for a token grid.

        Raises:
            ValueError: it is larger than the token grid.
        """
        if not isinstance(self.grid, tuple):
            return max(round(self.grid * grid[0]), 1), max(round(self.grid * grid[1]), 1)
        if self.grid[0] > grid[0] or self.grid[1] > grid[1]:
            raise ValueError(f"expedit: grid {self.grid} is larger than the token grid {grid}; ask for fewer clusters along each side")
        return self.grid

    @classmethod
    def identity(cls, n: int) -> Method:
        """As many clusters as tokens, and every token its own cluster."""
        return cls(grid=1.0, tau=1e6, neighbours=1)


def read_tau(name: str) -> float:
    """The `tau` of a YAML file that `vtr calibrate expedit` wrote, or of a recipe with calibrated settings.

    Raises:
        ValueError: not a readable file with a number.
    """
    import yaml

    path = Path(name)
    if not path.is_file():
        raise ValueError(f"expedit: tau={name!r} is neither a number, 'auto' nor a file; write one with `vtr calibrate expedit`")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"expedit: {name} is not a readable YAML file ({error}); write it with `vtr calibrate expedit`") from error
    found: Any = content
    for key in ("settings", "expedit", "tau"):  # the last must be there
        found = found.get(key, None if key == "tau" else found) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < float("inf"):
        raise ValueError(f"expedit: {name} has no positive number under 'tau', got {found!r}; write it with `vtr calibrate expedit`")
    return float(found)


def _cluster(view: View, method: Expedit, tau: float | str) -> Selection:
    grids = by_grid([view.grid(group) for group in range(len(view.grids))])
    most = max((grid for grid, _ in grids), key=lambda grid: grid[0] * grid[1])
    if view.tokens.shape[1] != most[0] * most[1]:
        raise VtrError(
            f"expedit: needs the whole token grid of {most[0]} x {most[1]}, got {view.tokens.shape[1]} tokens; it must come before methods "
            "that remove tokens in the tower"
        )
    image = (view.cells[:, 0, 0] == 0).cumsum(0) - 1  # views and windows of an image follow its first
    if len(grids) == 1:
        found, memory = _cluster_grid(view.tokens, view.real, image, most, grids[0][1], method, tau)
        view.memory["clusters"] = [memory]
        return found
    selections, memories = [], []
    for grid, groups in grids:
        n = grid[0] * grid[1]
        first = (image[groups, None] == image[groups]).to(torch.uint8).argmax(1)  # the first of these groups that is of the same image
        found, memory = _cluster_grid(view.tokens[groups, :n], view.real[groups, :n], first, grid, groups, method, tau)
        selections.append(found)
        memories.append(memory)
    view.memory["clusters"] = memories
    own = [groups for _, groups in grids]
    used = [s.real if s.real is not None else s.index >= 0 for s in selections if s.index is not None]  # all of them
    index, tokens, assign = (together([getattr(s, name) for s in selections], own) for name in ("index", "tokens", "assign"))
    return Selection(index=index, real=together(used, own), tokens=tokens, assign=assign)


def _cluster_grid(
    tokens: Tensor, real: Tensor, image: Tensor, grid: tuple[int, int], groups: list[int], method: Expedit, tau: float | str
) -> tuple[Selection, _Clusters]:
    """Clusters `tokens (G, rows * cols, D)` of one grid; `image (G,)` int64 below G is equal for the rows of one image."""
    clusters = method.clusters(grid)
    sharp = auto_tau(tokens, grid, clusters, method.window, image) if isinstance(tau, str) else tau
    centres = cluster(tokens, grid, clusters, tau=sharp, iterations=method.iterations, window=method.window)
    home = home_cells(grid, clusters, tokens.device)
    if method.reconstruct:
        pivot, some = cell_centres(grid, clusters, tokens.device).expand(len(centres), -1), None
    else:  # patches that unpadding cuts off cannot stand for a cluster
        pivot, some = cell_pivots(grid, clusters, real)
    selection = Selection(index=pivot, real=some, tokens=centres, assign=pivot[:, home], grid=clusters)
    return selection, _Clusters(groups, tokens, centres, sharp)


def _restore(view: View, method: Expedit) -> Tensor:
    memories: list[_Clusters] = view.memory["clusters"]
    most = max(kept.centres.shape[1] for kept in memories)
    if view.tokens.shape[1] != most:
        raise VtrError(f"expedit: made {most} clusters but {view.tokens.shape[1]} are left to restore; put no other method between")
    if len(memories) == 1:
        return _restored(view.tokens, memories[0], method)
    parts = [_restored(view.tokens[kept.groups, : kept.centres.shape[1]], kept, method) for kept in memories]
    return together(parts, [kept.groups for kept in memories])


def _restored(tokens: Tensor, kept: _Clusters, method: Expedit) -> Tensor:
    """Returns all tokens of the groups of one grid, from their refined centres."""
    if method.reconstruct == "naive":
        kept.labels = hard_labels(kept.tokens, kept.centres) if kept.labels is None else kept.labels
        return take(tokens, kept.labels)
    if not method.compat and are_few(method.neighbours, kept.centres.shape[1]):
        kept.nearest = kept.nearest or nearest(kept.tokens, kept.centres, tau=kept.tau, neighbours=method.neighbours)
        return mean_of_nearest(*kept.nearest, tokens)
    if kept.weights is None:
        kept.weights = reconstruction(
            kept.tokens, kept.centres, tau=kept.tau, neighbours=method.neighbours, normalize="l2" if method.compat else "sum"
        )
    return reconstruct(kept.weights, tokens)
