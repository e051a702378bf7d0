"""SCOPE: keep the tokens that stand for most of the image and that CLS attends to, one after the other.

Paper: SCOPE, NeurIPS 2025, arXiv 2510.24214.
Code:  github.com/kinredon/SCOPE at 6bf7306 (no licence): nothing copied, checked against its outputs.
Stage: boundary, before the projector. Reads: CLS row and output of the feature layer. Batch: any. Deterministic: yes.

1. The similarity of two tokens is the cosine of their features in front of the projector.
2. How well a token is covered is its largest similarity to a kept token, 0 while none is kept.
3. The gain of a token is how much better all tokens together would be covered with it.
4. Until the budget is spent, keep the token with the largest gain x saliency^alpha. The saliency is the attention that CLS pays to the token in
   the tower layer whose output is used.
5. Each view of an AnyRes image is treated alike, with its share of the budget.

Paper to code: alpha -> alpha, K -> keep, coverage gain -> the first factor in `greedy_coverage`.
Departures: every image of a batch has its own budget (the code lets all prompts of a batch share one), views share it by largest remainder (the
code rounds down), the padding of AnyRes images is no candidate and covers nothing, newline tokens stay. Without a CLS token the saliency is the
attention received from all tokens in the last tower layer, as a third party's port for Qwen2.5-VL has it; `alpha=0` needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.blocks import in_blocks
from vtr.ops.coverage import greedy_coverage
from vtr.ops.gather import index_to_mask
from vtr.ops.precision import widened
from vtr.ops.unit import unit_rows
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, FrameOption, Geometry, Method, PositionOption, Remove, Selection, Signal, Stage, Step, View
from vtr.types.signals import cls_row, received

Combined = Literal["multiply", "add"]


def scope(
    features: Tensor, saliency: Tensor | None, real: Tensor, keep: Tensor, most: int, alpha: float = 1.0, combined: Combined = "multiply"
) -> Tensor:
    """Keeps tokens that cover the others and are salient.

    Args:
        features: `(G, N, D)`, one row per view, any float dtype; cosines in float32 at least.
        saliency: `(G, N)`, non-negative, higher is more salient; None with alpha 0.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        most: `keep.max()` or more as a Python int, so that nothing here waits for the device.
        alpha: power of the saliency.
        combined: how gain and saliency become a score.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row; ties go to the lowest index. `O(N^2 (D + most))`.
    """
    picks, _ = scope_picks(features, saliency, real, most, alpha, combined)
    return index_to_mask(picks, torch.arange(most, device=keep.device) < keep[:, None], real.shape[1])


@in_blocks
def scope_picks(
    features: Tensor, saliency: Tensor | None, real: Tensor, most: int, alpha: float = 1.0, combined: Combined = "multiply"
) -> tuple[Tensor, Tensor]:
    """The first `most` picks `(G, most)` int64 in order, and the score of each."""
    unit = unit_rows(features, real=real)
    weight = None if saliency is None or alpha == 0 else widened(saliency).nan_to_num().to(unit.dtype).clamp_min(0) ** alpha
    if combined == "add":
        return greedy_coverage(unit @ unit.mT, real, most, bonus=real.to(unit.dtype) if weight is None else weight)
    return greedy_coverage(unit @ unit.mT, real, most, weight=weight)


@register_method("scope")
@dataclass(frozen=True, kw_only=True)
class SCOPE(Method):
    """The default budget is a third, the paper's 192 of 576; positions are renumbered as the authors do."""

    alpha: float = 1.0
    combined: Combined = "multiply"
    features: Literal["tower", "projected"] = "tower"

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    published_positions: ClassVar[PositionOption] = "renumber"
    frames_unless_told: ClassVar[FrameOption] = "each"
    card: ClassVar[Card] = Card(
        title="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
        paper="SCOPE, 2025",
        venue="NeurIPS 2025",
        arxiv="2510.24214",
        code="github.com/kinredon/SCOPE (no licence, not used)",
        signals="CLS attention and output of the feature layer; without CLS attention received in the last tower layer",
        cost="N x N cosines of a view once, then one pass over them per kept token",
        settings={
            "alpha": "power of the saliency; 0 is coverage alone",
            "combined": "multiply: gain x saliency^alpha; add: gain + saliency^alpha with the saliency summed over heads, a switch of the code",
            "features": "tower: in front of the projector, as published; projected: behind it, as a port for Qwen2.5-VL has it",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"scope: alpha must be 0 or more, got {self.alpha}; the paper uses 1")
        if self.combined not in ("multiply", "add"):
            raise ValueError(f"scope: combined must be 'multiply' or 'add', got {self.combined!r}")
        if self.features not in ("tower", "projected"):
            raise ValueError(f"scope: features must be 'tower' or 'projected', got {self.features!r}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        heads = self.combined == "add"
        saliency = cls_row(geometry.feature_layer, heads=heads) if geometry.has_cls else received(geometry.tower_layers - 1, heads=heads)
        needs = () if self.alpha == 0 else (saliency,)
        where = Boundary(before_projector=self.features == "tower")
        return (Remove(where, lambda view: self._select(view, needs), needs, per="view"),)

    def _select(self, view: View, needs: tuple[Signal, ...]) -> Selection:
        saliency = view.signals[needs[0]] if needs else None
        if saliency is not None and saliency.ndim == 3:
            saliency = saliency.sum(1)
        return Selection(keep=scope(view.tokens, saliency, view.real, view.keep, view.most, self.alpha, self.combined))
