"""VisPruner: keep what CLS attends to, and of the rest what is left after removing duplicates.

Paper: Zhang et al., ICCV 2025, arXiv 2412.01818.
Code:  github.com/Theia-4869/VisPruner at aefa01a, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary, before the projector. Reads: CLS row and output of the feature layer. Batch: any. Deterministic: yes.

1. Tokens are ranked by the attention that CLS pays to them in the tower layer whose output is used, mean over heads.
2. The first `floor(r T)` are important and stay. The others, best first, are the residual.
3. While the residual is larger than what is left of the budget: every second one, from the first, is compared with those between, and the
   8 (at the end fewer) whose nearest among them is most similar by cosine are removed.
4. The residual becomes: the compared ones that are left, most similar first, then those between as they were. Step 3 splits it anew.
5. Important and residual stay in their order. Each view of an AnyRes image is treated alike, with its share of the budget.

Paper to code: T -> keep, r -> important_ratio. The number 8, the split by rank and the order of the residual are only in the code.
Departures: a residual of odd size is allowed (the code stops with an error; here the compared half has one more), as is one too small to lose
8; the padding of AnyRes images is no candidate and newline tokens stay, where the code leaves out unpadding and newlines.
Without a CLS token the score is the attention received from all tokens in the last tower layer. Where several patches become a token (Qwen-VL),
that of its patches is added up, and tokens are compared and removed behind the projector, as the authors say in their issue 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.received import attention_received
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, FrameOption, Geometry, Method, PositionOption, Remove, Selection, Signal, Stage, Step, View
from vtr.types.signals import cls_row, keys, queries, received

STEP = 8  # tokens removed per round; Theia-4869/VisPruner llava/model/llava_arch.py at aefa01a


def vispruner(features: Tensor, score: Tensor, real: Tensor, keep: Tensor, removed: int, important_ratio: float = 0.5) -> Tensor:
    """Keeps the most attended tokens and, of the rest, those without a near duplicate.

    Args:
        features: `(G, N, D)`, one row per view, any float dtype; cosines in float32.
        score: `(G, N)`, higher is more important.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        removed: at least the largest `real.sum(1) - keep`, a Python int, so that nothing here waits for the device.
        important_ratio: r.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row; ties go to the lowest index. `O(N^2 D)` once, then `removed / 8` rounds of
        at most `O(N^2 / 2)`, without a host sync.
    """
    n = real.shape[1]
    important = (keep.double() * important_ratio).long()
    diverse = keep - important
    ranked = score if score.dtype == torch.float64 else score.float()
    order = ranked.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~real).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))  # real ones in front
    place = torch.arange(n, device=real.device)
    residual = order.gather(1, (place + important[:, None]).clamp_max(n - 1))
    size = real.sum(1) - important  # of the residual; only so many entries of a row mean something
    stays = topk_mask(score, real, important)
    gone = torch.zeros(len(real), n + 1, dtype=torch.bool, device=real.device)
    only_important = diverse == 0  # nothing to compare for
    size = torch.where(only_important, 0, size)

    unit = F.normalize(features.float().nan_to_num(), dim=-1)
    cosine = (unit @ unit.mT).flatten(0, 1)  # (G * N, N)
    row = torch.arange(len(real), device=real.device)[:, None] * n
    for done in range(ceil(removed / STEP) + STEP.bit_length()):  # the last rounds are for residuals too small to lose 8
        residual = residual[:, : max(n - done * STEP, 2 * STEP)]
        compared, between = residual[:, 0::2], residual[:, 1::2]
        if between.shape[1] == 0:
            break
        half = (size + 1) // 2
        less = torch.minimum(half, size - diverse).clamp(0, STEP)
        open_to = torch.full((len(real), n + 1), -torch.inf, device=real.device)
        open_to.scatter_(1, torch.where(place[: between.shape[1]] < (size - half)[:, None], between, n), 0.0)
        near = cosine.index_select(0, (row + compared).flatten()).view(*compared.shape, n)
        near = (near + open_to[:, None, :n]).amax(2).masked_fill(place[: compared.shape[1]] >= half[:, None], -torch.inf)
        compared = compared.gather(1, near.argsort(dim=1, descending=True, stable=True))  # most similar first
        losing = place[: compared.shape[1]] < less[:, None]
        gone.scatter_(1, torch.where(losing, compared, n), True)
        left = (half - less)[:, None]
        at = place[: residual.shape[1]]
        source = torch.where(at < left, at + less[:, None], compared.shape[1] + at - left)
        residual = torch.cat([compared, between], 1).gather(1, source.clamp_max(residual.shape[1] - 1))
        size = size - less
    return torch.where(only_important[:, None], stays, real & ~gone[:, :n])


@register_method("vispruner")
@dataclass(frozen=True, kw_only=True)
class VisPruner(Method):
    """The default is 128 of 576 tokens with half of them important, as in the paper; positions are renumbered as the authors do."""

    important_ratio: float = 0.5

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=128 / 576)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
        paper="Zhang et al., 2025",
        venue="ICCV 2025",
        arxiv="2412.01818",
        code="github.com/Theia-4869/VisPruner",
        signals="CLS attention and output of the feature layer; without CLS queries and keys of the last tower layer",
        cost="N x N cosines once, then a round of at most N^2 / 2 comparisons per 8 tokens removed",
        settings={"important_ratio": "share of the budget that goes to the most attended tokens; 1 is FasterVLM"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important_ratio <= 1:
            raise ValueError(f"vispruner: important_ratio must be from 0 to 1, got {self.important_ratio}; the paper uses 0.5")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        last = geometry.tower_layers - 1
        needs: tuple[Signal, ...] = (queries(last, tower=True), keys(last, tower=True))
        if geometry.has_cls:
            needs = (cls_row(geometry.feature_layer),)
        elif geometry.joins > 1:
            needs = (received(last),)
        return (Remove(Boundary(before_projector=geometry.joins == 1), lambda view: self._select(view, needs), needs, per="view"),)

    def _select(self, view: View, needs: tuple[Signal, ...]) -> Selection:
        score = view.signals[needs[0]]
        if len(needs) == 2:
            score = attention_received(score, view.signals[needs[1]], view.real, scaling=view.scaling.get(needs[0]))
        removed = max(count - keep for count, keep in zip(view.counts, view.keeps, strict=True))
        return Selection(keep=vispruner(view.tokens, score, view.real, view.keep, removed, self.important_ratio))
