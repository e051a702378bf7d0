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

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.received import attention_received
from vtr.ops.topk import ranked
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, FrameOption, Geometry, Method, PositionOption, Remove, Selection, Signal, Stage, Step, View
from vtr.types.signals import cls_row, keys, queries, received

STEP = 8  # tokens removed per round; Theia-4869/VisPruner llava/model/llava_arch.py at aefa01a


def vispruner(
    features: Tensor,
    score: Tensor,
    real: Tensor,
    keep: Tensor,
    removed: int,
    important_ratio: float = 0.5,
    known: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Tensor:
    """Keeps the most attended tokens and, of the rest, those without a near duplicate.

    Args:
        features: `(G, N, D)`, one row per view, any float dtype; cosines in float32.
        score: `(G, N)`, higher is more important.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        removed: at least the largest `real.sum(1) - keep`, a Python int, so that nothing here waits for the device.
        important_ratio: r.
        known: `real.sum(1)` and `keep` as Python ints; where all rows have the same, nothing needs a mask.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row; ties go to the lowest index. `O(N^2 D)` once, then `removed / 8` rounds of
        at most `O(N^2 / 4)`, without a host sync.
    """
    n = real.shape[1]
    unit = F.normalize(features.detach().float().nan_to_num(), dim=-1)
    cosine = unit @ unit.mT  # (G, N, N)
    order = torch.where(real, ranked(score), -torch.inf).argsort(dim=1, descending=True, stable=True)
    if known is not None and len(set(known[0])) == len(set(known[1])) == 1:
        count, number = known[0][0], known[1][0]
        first = int(number * important_ratio)
        rest = _uniform(cosine, order[:, first:count], number - first) if number > first else order[:, :0]
        return torch.zeros_like(real).scatter_(1, torch.cat([order[:, :first], rest], 1), True)
    important = (keep.double() * important_ratio).long()
    place = torch.arange(n, device=real.device)
    size = torch.where(keep > important, real.sum(1) - important, 0)  # of the residual; nothing to compare for where it is 0
    residual = order.gather(1, (place + important[:, None]).clamp_max(n - 1))
    gone = _ragged(cosine, torch.where(place < size[:, None], residual, n), size, keep - important, removed)
    stays = torch.zeros(len(real), n + 1, dtype=torch.bool, device=real.device).scatter_(1, gone, True)[:, :n].logical_not_() & real
    important_ones = torch.zeros_like(real).scatter_(1, order, place < important[:, None])
    return torch.where((keep == important)[:, None], important_ones, stays)


def _uniform(cosine: Tensor, residual: Tensor, diverse: int) -> Tensor:
    """Steps 3 and 4 where all rows have as many tokens: `(G, diverse)` of a residual `(G, R)`, by cosines `(G, N, N)`."""
    while (size := residual.shape[1]) > diverse:
        compared, between = residual[:, 0::2], residual[:, 1::2]
        similar = _nearest(cosine, compared, between).argsort(dim=1, descending=True, stable=True)
        less = min(STEP, compared.shape[1], size - diverse)
        residual = torch.cat([compared.gather(1, similar[:, less:]), between], 1)  # most similar first
    return residual


def _ragged(cosine: Tensor, residual: Tensor, size: Tensor, diverse: Tensor, removed: int) -> Tensor:
    """Steps 3 and 4 of a residual `(G, N)` whose first `size (G,)` entries are tokens and the others N; what is removed, N for nothing."""
    n = cosine.shape[1]
    cosine = F.pad(cosine, (0, 1, 0, 1), value=-torch.inf)
    place = torch.arange(STEP, device=cosine.device)
    gone = []
    for done in range(ceil(removed / STEP) + STEP.bit_length()):  # the last rounds are for residuals too small to lose 8
        residual = residual[:, : max(n - done * STEP, 2 * STEP)]
        compared, between = residual[:, 0::2], residual[:, 1::2]
        if between.shape[1] == 0:
            break
        less = torch.minimum((size + 1) // 2, size - diverse).clamp(0, STEP)
        similar = _nearest(cosine, compared, between).argsort(dim=1, descending=True, stable=True)
        compared = compared.gather(1, similar)  # most similar first
        losing, first = place[: compared.shape[1]] < less[:, None], compared[:, :STEP]
        gone.append(torch.where(losing, first, n))
        residual = torch.cat([torch.where(losing, n, first), compared[:, STEP:], between], 1)
        residual = residual.gather(1, (residual == n).to(torch.uint8).argsort(dim=1, stable=True))
        size = size - less
    return torch.cat(gone, 1) if gone else residual[:, :0]


def _nearest(cosine: Tensor, compared: Tensor, between: Tensor) -> Tensor:
    """The largest cosine `(G, C)` of tokens `compared (G, C)` to any of `between (G, B)`, from `(G, N, N)`."""
    groups, n, _ = cosine.shape
    rows = (compared + torch.arange(groups, device=cosine.device)[:, None] * n).flatten()
    near = cosine.flatten(0, 1).index_select(0, rows).view(*compared.shape, n)
    return near.gather(2, between[:, None].expand(-1, compared.shape[1], -1)).amax(2)


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
        cost="N x N cosines once, then a round of at most N^2 / 4 comparisons per 8 tokens removed",
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
        known = view.counts, view.keeps
        return Selection(keep=vispruner(view.tokens, score, view.real, view.keep, removed, self.important_ratio, known))
