"""Expedit's tau for one encoder, and on request its depth and grid: what changes the encoder's output least on a few pictures.

The error of a candidate is the relative squared error of the visual tokens behind the last block that is used, with Expedit against without:
`sum |reduced - full|^2 / sum |full - mean|^2`, where the mean is over the tokens of an image; the mean over images. 0 is the full model,
1 is as bad as giving every token the mean of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from vtr.ops.sharpness import auto_tau
from vtr.planning import plan
from vtr.reduction import reduced
from vtr.registry import create_method
from vtr.types import Geometry, Method, Selection, Step, Tower, View
from vtr.types.errors import WrongValue

Inputs = Tensor | Mapping[str, Any]
Grid = tuple[int, int] | float
TIMES = tuple(2 ** (n / 2) for n in range(-2, 7))
"""What the median of the taus that the images would get by themselves is multiplied with: from half of it to eight times as much."""


class _Seen(Exception):
    """Ends a forward once the output of the encoder is known, so that no LLM runs."""


@dataclass
class _Watch:
    """Changes the steps of Expedit so that they note the tokens behind its last block, and do nothing else where `full`.

    `seen` gets these tokens of every input, `taus` those that `auto_tau` gives its images, `sizes` their numbers of tokens and clusters.
    """

    method: Any
    full: bool = False
    seen: list[Tensor] = field(default_factory=list)
    taus: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def change(self, _method: Method, steps: tuple[Any, ...]) -> tuple[Step, ...]:
        """Returns the steps that note what they see, for `Plan.map`."""
        merge, restore = steps
        if self.full:
            merge = replace(merge, where=Tower(restore.layer - 1), select=_nothing, grid=lambda grid: grid)
            return merge, replace(restore, select=lambda view: self._end(view.tokens))
        first = replace(merge, select=lambda view: self._begin(view, merge.select))
        return first, replace(restore, select=lambda view: self._end(restore.select(view)))

    def _begin(self, view: View, select: Any) -> Selection:
        grid, image = view.grid(0), (view.cells[:, 0, 0] == 0).cumsum(0) - 1
        clusters = self.method.clusters(grid)
        self.sizes.append((grid[0] * grid[1], clusters[0] * clusters[1]))
        if self.method.tau == "auto":
            self.taus.append(auto_tau(view.tokens, grid, clusters, self.method.window, image))
        return select(view)

    def _end(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens.float().flatten(0, 1))
        raise _Seen


def _nothing(view: View) -> Selection:
    every = torch.arange(view.tokens.shape[1], device=view.tokens.device).expand(len(view.tokens), -1)
    return Selection(index=every, tokens=view.tokens, assign=every, grid=view.grid(0))


@dataclass(frozen=True)
class Candidate:
    """Settings that were tried: `tau` is None where each image gave its own.

    `tokens` is their mean number over the blocks as a share of the full model's, `error` as this module defines it, `ms` the median time of
    the encoder for one input.
    """

    tau: float | None
    alpha: int
    grid: Grid
    tokens: float
    error: float
    ms: float


@dataclass(frozen=True)
class Calibration:
    """The best candidate, all of them, and what `expedit` knows the encoder by: its depth and its patch weights. `full_ms` is its own time."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    window: int
    layers: int
    patch_norm: float | None
    full_ms: float

    def settings(self) -> dict[str, Any]:
        """As recipes hold it."""
        grid = list(self.best.grid) if isinstance(self.best.grid, tuple) else self.best.grid
        encoder = {"layers": self.layers, "patch_norm": None if self.patch_norm is None else float(f"{self.patch_norm:.6g}")}
        return {"tau": self.best.tau, "alpha": self.best.alpha, "grid": grid, "window": self.window, "encoder": encoder}


@torch.no_grad()
def search(
    model: nn.Module,
    batches: Iterable[Inputs],
    alphas: Sequence[int | None] = (None,),
    grids: Sequence[Grid] = (0.7,),
    window: int = 5,
    most_tokens: float = 1.0,
    advance: Callable[[int], None] = lambda count: None,
) -> Calibration:
    """Finds the settings whose output differs least from the full encoder's, over a few images.

    For every depth and grid each image first runs with the tau that it gives itself (`vtr.ops.sharpness`); then all run with one tau, from
    half of the median of those to eight times as much.

    Args:
        model: with a host; in eval mode. It is not changed, and nothing behind its encoder runs.
        batches: inputs of the model, as keyword arguments or as its one argument; 8 images are enough.
        alphas, grids: that are tried, each with each; see `expedit`.
        window: of the clustering.
        most_tokens: the best is looked for among the candidates with at most this share of the tokens, averaged over the blocks.
        advance: called with 1 after every input, `(1 + len(alphas) * len(grids) * (1 + len(TIMES))) * len(batches)` times in all.

    Raises:
        ValueError: no image, images without any difference between tokens, or no candidate with so few tokens.
    """
    inputs = list(batches)
    if not inputs:
        raise WrongValue("calibrate expedit: needs at least one image, got none")
    methods: list[Any] = [create_method("expedit", alpha=alpha, grid=grid, window=window) for alpha, grid in product(alphas, grids)]
    full = _Watch(method=methods[0], full=True)
    geometry, full_ms = _run(model, full, inputs, advance)
    variance = [float((one - one.mean(0)).square().sum()) for one in full.seen]
    if 0 in variance:
        raise WrongValue("calibrate expedit: needs images in which tokens differ, got one without; give pictures with something on them")

    def tried(watch: _Watch, tau: float | None) -> Candidate:
        merge, restore = watch.method.steps(geometry)
        ms = _run(model, watch, inputs, advance)[1]
        left = fmean(clusters / tokens for tokens, clusters in watch.sizes)
        error = fmean(float((a - b).square().sum()) / v for a, b, v in zip(watch.seen, full.seen, variance, strict=True))
        tokens = (merge.layer + (restore.layer - merge.layer) * left) / restore.layer
        return Candidate(tau=tau, alpha=merge.layer, grid=watch.method.grid, tokens=tokens, error=error, ms=ms)

    found: list[Candidate] = []
    for method in methods:
        own = _Watch(method=method)
        found.append(tried(own, None))
        middle = float(torch.cat(own.taus).median())
        taus = [float(f"{middle * times:.4g}") for times in TIMES]
        found += [tried(_Watch(method=replace(method, tau=tau)), tau) for tau in taus]
    few = [one for one in found if one.tau is not None and one.tokens <= most_tokens]
    if not few:
        least = min(one.tokens for one in found)
        raise WrongValue(
            f"calibrate expedit: no candidate has at most {most_tokens:g} of the tokens, the fewest are {least:.2f}; "
            "try a smaller alpha or grid as well"
        )
    return Calibration(
        best=min(few, key=lambda one: one.error),
        candidates=tuple(found),
        window=window,
        layers=geometry.tower_layers,
        patch_norm=geometry.patch_norm() if geometry.patch_norm else None,
        full_ms=full_ms,
    )


def _run(model: nn.Module, watch: _Watch, inputs: Sequence[Inputs], advance: Callable[[int], None]) -> tuple[Geometry, float]:
    """Runs the encoder on every input; returns its geometry, and the median time of an input in ms."""
    times, watched = [], plan(model, watch.method).map(watch.change)
    for one in inputs:
        with reduced(model, watched) as reduction:
            geometry, start = reduction.host.geometry(), perf_counter()
            with suppress(_Seen):
                model(**one) if isinstance(one, Mapping) else model(one)
            watch.seen[-1].sum().item()  # waits for a GPU
            times.append(1e3 * (perf_counter() - start))
        advance(1)
    return geometry, median(times)
