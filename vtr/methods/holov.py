"""HoloV: share the budget out over bands of the image by attention, and keep the best of every band.

Paper: HoloV, NeurIPS 2025, arXiv 2510.02912, Section 4.1.
Code:  github.com/obananas/HoloV at 1d2e65e, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary. Reads: CLS row of the feature layer. Batch: any. Deterministic: yes.

1. A token's score is the attention that CLS pays to it in the tower layer whose output is used, mean over heads.
2. The tokens of an image are cut, in raster order, into C runs of equal length, the crops: C = 1024 N / (576 keep), rounded down.
3. A crop's weight is its mean score to the power of tau.
4. Crops share the budget in proportion to their weights, rounded down; what is left goes one each to the heaviest crops. A crop whose share is
   more than it has keeps all its tokens, and the others share what is left anew.
5. Every crop keeps its best tokens by score. `rule="holistic"` ranks them by H = A + V instead: score plus the variance of a token's cosines to
   the rest of its crop, scaled to the mean score of the crop.

Paper to code: K -> keep, N_c -> crops, tau -> tau, w_c -> the weights of `dealt`, H -> `holistic_score`.
Departures: the released code ranks by attention alone, and its variance cancels out of the quotas too, so features have no influence on it:
`rule="attention"` is what it does, `rule="holistic"` what the paper says. What a full crop cannot take is dealt again (the code fills the place up
with zero vectors), crops of one token are like any other, kept tokens stay in position order (the code: crop by crop, by score). The budget of an
AnyRes image is one, over thumbnail and canvas; its padding is no candidate. `scripts/replay/holov.py` has the code's versions. Refetching while
decoding, in the paper's appendix, is not offered. Without a CLS token the score is the attention received from all tokens in the last tower layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.canvas import on_device
from vtr.ops.gather import left_align
from vtr.ops.precision import widened
from vtr.ops.split import Parts, gather_parts, join_mask
from vtr.ops.topk import NO_WEIGHT, ranked, topk_ranked
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, Geometry, Method, PositionOption, Remove, Selection, Signal, Stage, Step, View, VtrError
from vtr.types.signals import cls_row, received

Rule = Literal["attention", "holistic"]


def crop_count(tokens: int, keep: int, crops: int | None = None) -> int:
    """Returns into how many crops an image of so many tokens is cut: `crops` if given, else 1024 N / (576 keep); 1 to N."""
    wanted = 1024 * tokens // (576 * max(keep, 1)) if crops is None else crops
    return min(max(wanted, 1), max(tokens, 1))


def bands(real: Tensor, counts: Sequence[int], crops: Sequence[int]) -> Parts:
    """Cuts the real tokens of each row into runs of equal length; the first ones are longer by one where it does not come out even.

    Args:
        real: `(G, N)` bool.
        counts: `real.sum(1)`.
        crops: runs of each row, 1 to its count.

    Returns:
        Parts with `token` and `real (G, C, W)`, as many as the most runs and as wide as the longest; `keep` is the length of each run. No host sync.
    """
    rows, n = [(*divmod(count, number), number) for count, number in zip(counts, crops, strict=True)], real.shape[1]
    starts = [[min(run, number) * base + min(run, longer) for run in range(max(crops) + 1)] for base, longer, number in rows]
    start = on_device(starts, real.device)
    size, within = start.diff(dim=1), torch.arange(max(base + (longer > 0) for base, longer, _ in rows), device=real.device)
    index = (start[:, :-1, None] + within).clamp_max(n - 1)
    if min(counts) < n:
        index = left_align(real, n)[0].gather(1, index.flatten(1)).view_as(index)
    return Parts(index, within < size[..., None], size)


def dealt(weight: Tensor, size: Tensor, keep: Tensor, rounds: int) -> Tensor:
    """Shares a budget over crops: rounded down, the rest to the heaviest, and again without crops that are full.

    Args:
        weight: `(G, C)` float64, non-negative; crops without weight share alike when no other is open.
        size: `(G, C)` int64, tokens of each crop.
        keep: `(G,)` int64, at most `size.sum(1)`.
        rounds: one more than crops that can be full, a Python int.

    Returns:
        `(G, C)` int64 that sum to `keep`; ties go to the first crop. `O(C log C + rounds C)`, no host sync.
    """
    weight, order = torch.where(size > 0, weight.clamp_min(NO_WEIGHT), 0).sort(dim=1, descending=True, stable=True)
    room = size.gather(1, order)
    is_open = room > 0
    for _ in range(rounds):
        left = keep[:, None] - room.masked_fill(is_open, 0).sum(1, keepdim=True)
        mine = weight * is_open
        share = (left * mine / mine.sum(1, keepdim=True).clamp_min(1e-300)).floor()
        heaviest = is_open & (is_open.cumsum(1) <= left - share.sum(1, keepdim=True))
        share = share + heaviest
        is_open = is_open & (share <= room)
    return torch.empty_like(size).scatter_(1, order, torch.where(is_open, share.long(), room))


def holistic_score(score: Tensor, features: Tensor, real: Tensor) -> Tensor:
    """Score plus rescaled variance of similarity, both of one crop.

    Args:
        score: `(P, W)`, one row per crop.
        features: `(P, W, D)`, any float dtype; cosines in float32 at least.
        real: `(P, W)` bool.

    Returns:
        `(P, W)`; in a crop of one token its score.
    """
    wide = widened(features).nan_to_num()
    wide = (wide / (wide.norm(dim=-1, keepdim=True) + 1e-6)).masked_fill(~real[..., None], 0)
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    similarity = (wide @ wide.mT).masked_fill(itself, 0)  # (P, W, W)
    number = real.sum(1, keepdim=True)
    others = (number - 1).clamp_min(1)
    mean = similarity.sum(2) / others
    spread = torch.where(real[:, None], (similarity - mean[..., None]).square(), 0).sum(2) / others
    spread = torch.where(real, spread, 0)
    own = torch.where(real, score, 0).to(spread.dtype)
    scaled = spread * own.abs().sum(1, keepdim=True) / (spread.sum(1, keepdim=True) + 1e-6 * number.clamp_min(1))
    return torch.where(number > 1, own + scaled, own)


def holov(
    score: Tensor,
    real: Tensor,
    keep: Tensor,
    counts: Sequence[int],
    keeps: Sequence[int],
    crops: int | None = None,
    tau: float = 1.0,
    features: Tensor | None = None,
) -> Tensor:
    """Keeps the best tokens of every crop.

    Args:
        score: `(G, N)`, non-negative, higher is better; any float dtype.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        counts, keeps: `real.sum(1)` and `keep` as Python ints, so that nothing here waits for the device.
        crops: how many crops; None = by the budget.
        tau: power of a crop's mean score.
        features: `(G, N, D)` for `rule="holistic"`; None for `rule="attention"`.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row; ties go to the lowest index. `O(N log N)`, with features `O(N W D)` for crops
        of W tokens.
    """
    number = [crop_count(n, k, crops) for n, k in zip(counts, keeps, strict=True)]
    rounds = max(min(c, k // max(n // c, 1)) for n, k, c in zip(counts, keeps, number, strict=True)) + 1
    cut = bands(real, counts, number)
    own, there = gather_parts(widened(score).nan_to_num().clamp_min(0), cut), cut.real.flatten(0, 1)  # (G * C, W)
    mean = torch.where(there, own.double(), 0).sum(1).view(cut.keep.shape) / cut.keep.clamp_min(1)
    quota = dealt(mean**tau, cut.keep, keep, rounds)
    score = own if features is None else ranked(holistic_score(own, gather_parts(features, cut), there))
    return join_mask(topk_ranked(torch.where(there, score, -torch.inf), quota.flatten()), cut, real.shape[1])


@register_method("holov")
@dataclass(frozen=True, kw_only=True)
class HoloV(Method):
    """Attention quotas over bands; the default budget is the code's 64 of 576. Positions are renumbered as the authors do."""

    rule: Rule = "attention"
    crops: int | None = None
    tau: float = 1.0
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 9)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
        paper="HoloV, 2025",
        venue="NeurIPS 2025",
        arxiv="2510.02912",
        code="github.com/obananas/HoloV",
        signals="CLS attention of the feature layer; without CLS attention received in the last tower layer",
        cost="one q_cls K product and sorts of N; rule='holistic' adds the cosines inside every crop",
        settings={
            "rule": "attention: the best of a crop by attention, as released; holistic: by attention and variance of similarity, the paper's",
            "crops": "runs of the raster order that share the budget; None: 1024 N / (576 keep)",
            "tau": "power of a crop's mean score in its share",
            "compat": "'authors': places of full crops filled with zero vectors, order by crop; pure functions and replay only",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("attention", "holistic"):
            raise ValueError(f"holov: rule must be 'attention' or 'holistic', got {self.rule!r}")
        if self.crops is not None and self.crops < 1:
            raise ValueError(f"holov: crops must be 1 or more, got {self.crops}; the paper uses 16, 8 and 5 at 64, 128 and 192 tokens")
        if self.tau < 0:
            raise ValueError(f"holov: tau must be 0 or more, got {self.tau}; the released code has 1")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat == "authors":
            raise VtrError(
                "holov: compat='authors' puts zero vectors in the place of tokens that full crops do not have; it runs in scripts/replay only; "
                "leave compat out to reduce a model"
            )
        score = cls_row(geometry.feature_layer) if geometry.has_cls else received(geometry.tower_layers - 1)
        return (Remove(Boundary(), lambda view: self._select(view, score), (score,)),)

    def _select(self, view: View, score: Signal) -> Selection:
        features = view.tokens if self.rule == "holistic" else None
        kept = holov(view.signals[score], view.real, view.keep, view.counts, view.keeps, self.crops, self.tau, features)
        return Selection(keep=kept)
