"""Expedit's tau for one encoder: the sharpness that suits the scale of its features where they are clustered.

The rule is `vtr.ops.clusters.calibrate_tau`'s, with one median over a few images instead of one per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtr.apply import reduced
from vtr.ops.clusters import MEDIAN_LOGIT, candidate_distances
from vtr.registry import create_method
from vtr.types import Geometry, Method, Selection, Step, View


@dataclass(frozen=True, kw_only=True)
class _Look(Method):
    """Takes the place of an Expedit method, notes the median distance of each row, and changes nothing."""

    method: Any = None
    medians: list[Tensor] = field(default_factory=list, compare=False)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        first = self.method.steps(geometry)[0]
        look = Step("tower", first.layer, "merge", select=self._note, counted=False, per="view", proportional=False)
        return look, Step("tower", first.layer + 1, "restore", select=lambda view: view.tokens, counted=False, per="view")

    def _note(self, view: View) -> Selection:
        distance = candidate_distances(view.tokens, view.patch_grid, self.method.clusters(view.patch_grid), self.method.window)
        self.medians.append(distance.flatten(1).nanmedian(1).values)
        every = torch.arange(view.tokens.shape[1], device=view.tokens.device).expand(len(view.tokens), -1)
        return Selection(index=every, tokens=view.tokens, assign=every, grid=view.patch_grid)


@dataclass(frozen=True)
class Calibration:
    """Tau of an encoder, the settings that it is for, and what `expedit` knows the encoder by: its depth and its patch weights."""

    tau: float
    alpha: int
    grid: tuple[int, int] | float
    window: int
    layers: int
    patch_norm: float | None

    def settings(self) -> dict[str, Any]:
        """As recipes hold it."""
        grid = list(self.grid) if isinstance(self.grid, tuple) else self.grid
        encoder = {"layers": self.layers, "patch_norm": None if self.patch_norm is None else float(f"{self.patch_norm:.6g}")}
        return {"tau": float(f"{self.tau:.4g}"), "alpha": self.alpha, "grid": grid, "window": self.window, "encoder": encoder}


@torch.no_grad()
def measure_tau(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], advance: Callable[[int], None] = lambda count: None, **settings: Any
) -> Calibration:
    """Tau at which the median of tau times the squared distance of a token to its candidate centres is 2, over a few images.

    Args:
        model: with a host; in eval mode. It is not changed.
        batches: inputs of the model, as keyword arguments or as its one argument; 8 images are enough.
        advance: called with 1 after every batch.
        **settings: of the method that tau is for: `alpha`, `grid`, `window`.

    Raises:
        ValueError: no image, or images without any difference between tokens.
    """
    look = _Look(method=create_method("expedit", **settings))
    with reduced(model, look) as reduction:
        geometry = reduction.host.geometry()
        for inputs in batches:
            model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
            advance(1)
    medians = torch.cat([median.float().cpu() for median in look.medians]) if look.medians else torch.empty(0)
    medians = medians[medians > 0]
    if not len(medians):
        raise ValueError("measure_tau: needs images in which tokens differ, got none; give pictures with something on them")
    return Calibration(
        tau=MEDIAN_LOGIT / float(medians.median()),
        alpha=look.method.steps(geometry)[0].layer,
        grid=look.method.grid,
        window=look.method.window,
        layers=geometry.tower_layers,
        patch_norm=geometry.patch_norm() if geometry.patch_norm else None,
    )
