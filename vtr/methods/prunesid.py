"""PruneSID: sort tokens into groups by principal components, and take the best of every group that are no duplicates.

Paper: PruneSID, ICLR 2026, arXiv 2603.09480.
Code:  github.com/ZhengyaoFang/PruneSID at 4ef17d9 (no licence file): nothing copied, checked against its outputs.
Stage: boundary, before the projector. Reads: CLS row and output of the feature layer. Batch: any. Deterministic: yes.

1. Features go through a sigmoid, and the mean over channels is taken off each token. The keep / 4 first principal components over the tokens are
   the groups; a token belongs to the one in which it weighs most.
2. Tokens are ranked by the attention that CLS pays to them in the tower layer whose output is used.
3. Best first, a token suppresses those of its group whose cosine to it is above keep / 32 times the mean cosine of all pairs.
4. Groups share the budget in proportion to the tokens that are left of them, at least 1 each and at most 5 per 64 of the budget.
5. A group keeps what is left of it, best first, then of the suppressed ones. Each view of an AnyRes image is treated alike.

Paper to code: rho -> the mean cosine, tau -> keep / 32 rho, semantic groups -> `groups_of`, N_k -> `group_quota`.
Departures: components are exact (the code draws them at random, unseeded, and two draws share half of the groups); the CLS token is no visual
token, so the budget is patches only; kept tokens stay in position order (the code: group by group); views share by largest remainder; the padding
of AnyRes images takes no part and newline tokens stay. As in the code, centring is over channels, which the paper does over tokens. Without a CLS
token a token's score is its weight in its own group, the paper's formula (`score="component"`). The dynamic budget of the paper's "-Dyn" rows is
not released and not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.blocks import in_blocks
from vtr.ops.components import component_weights, products_above
from vtr.ops.gather import take
from vtr.ops.parts import members
from vtr.registry import register_method
from vtr.types import (
    Boundary,
    Budget,
    Card,
    FrameOption,
    Geometry,
    Method,
    PositionOption,
    Remove,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    VtrError,
)
from vtr.types.signals import cls_row


class Ranked(NamedTuple):
    """Tokens best first: `order (G, N)` int64 into N (those without a token last), `survives (G, N)` bool, in that order."""

    order: Tensor
    survives: Tensor


def group_count(keep: int) -> int:
    """Returns the number of groups of a budget, at least 1."""
    return max(keep // 4, 1)


def groups_of(features: Tensor, real: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Step 1.

    Args:
        features: `(G, N, C)`, any float dtype, finite; computed in float64.
        real: `(G, N)` bool.
        groups: `(G,)` int64.
        most: `groups.max()` or more, a Python int.

    Returns:
        Group `(G, N)` int64 and weight in it `(G, N)` float64. Ties: first group.
    """
    rows = features.double().sigmoid()
    weights = component_weights(rows.sub_(rows.mean(2, keepdim=True)), real, most)
    weights = weights.masked_fill(torch.arange(most, device=real.device) >= groups[:, None, None], -1.0)
    best = weights.max(2)
    return best.indices, best.values


def mean_cosine(unit: Tensor, real: Tensor) -> Tensor:
    """Mean cosine of all pairs of real tokens: `(G,)`, from unit vectors `(G, N, C)`; 0 of a single token. `O(N C)`."""
    there, number = real.to(unit.dtype), real.sum(1)
    of_itself = (torch.linalg.vector_norm(unit, dim=2).square() * there).sum(1)
    both = (there[:, None] @ unit).square().sum((1, 2)) - of_itself
    return both / (number * (number - 1)).clamp_min(1)


def suppress(unit: Tensor, score: Tensor, group: Tensor, real: Tensor, threshold: Tensor) -> Ranked:
    """Step 3: best first, a token suppresses those of its group whose cosine to it is above the threshold.

    Args:
        unit: `(G, N, C)` unit vectors.
        score: `(G, N)`, higher is better. Ties: lowest index.
        group: `(G, N)` int64.
        real: `(G, N)` bool.
        threshold: `(G,)`.

    `O(N^2 C)` once, then N steps of `O(N)` on the device, without a host sync.
    """
    wide = score.double().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    order = wide.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~real).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    ranked, label, survives = take(unit, order), group.gather(1, order), real.gather(1, order)
    near = (products_above(ranked) > threshold[:, None, None]) & (label[:, :, None] == label[:, None])
    near = near.triu(1)  # only worse ones
    for own, alike in zip(survives.split(1, 1), near.unbind(1), strict=True):
        survives.gt_(alike.bitwise_and_(own))  # and not
    return Ranked(order, survives)


def group_quota(size: Tensor, survivors: Tensor, keep: Tensor, wanted: Tensor, most: int) -> Tensor:
    """Step 4.

    Args:
        size: `(G, P)` int64, tokens of each group.
        survivors: `(G, P)` int64, those that are not suppressed.
        keep: `(G,)` int64, what bounds are made for, at most `size.sum(1)`.
        wanted: `(G,)` int64, what is shared out, at most `keep`.
        most: `keep.max()` or more, a Python int.

    Returns:
        `(G, P)` int64 that sum to `wanted`. `O(P log(most P))`, no host sync.
    """
    low = size.clamp_max(1)
    high = torch.minimum(survivors, (5 * ((keep + 63) // 64))[:, None])
    below, rise = torch.zeros_like(keep), keep  # bounds rise by one until they reach the budget: the first rise that does, by halving
    for _ in range(most.bit_length() + 1):
        middle = (below + rise) // 2
        enough = torch.minimum(high + middle[:, None], size).sum(1) >= keep
        below, rise = torch.where(enough, below, torch.minimum(middle + 1, rise)), torch.where(enough, middle, rise)
    high = torch.minimum(high + rise[:, None], size)

    rest = (wanted - low.sum(1)).clamp_min(0)[:, None]
    reached = (rest.double() * survivors.cumsum(1) / survivors.sum(1, keepdim=True).clamp_min(1)).round().long()
    share = torch.minimum(reached.diff(dim=1, prepend=torch.zeros_like(reached[:, :1])) + low, high)
    by_survivors = survivors.argsort(dim=1, descending=True, stable=True)
    room = (high - share).gather(1, by_survivors)
    missing = (rest[:, 0] + low.sum(1) - share.sum(1))[:, None]
    more = torch.minimum((missing - room.cumsum(1) + room).clamp_min(0), room)
    return share + torch.zeros_like(share).scatter(1, by_survivors, more)


def ordered(ranked: Ranked, group: Tensor, real: Tensor, quota: Tensor) -> tuple[Tensor, Tensor]:
    """Step 5: tokens group by group, in a group those that survive best first, then the others.

    Returns:
        `(G, N)` int64 into N in this order, and `(G, N)` bool, which of them are within the quota `(G, P)` of their group.
    """
    groups = quota.shape[1]
    label = torch.where(real, group, groups).gather(1, ranked.order)
    by_group = (2 * label + (~ranked.survives).long()).argsort(dim=1, stable=True)
    order, label = ranked.order.gather(1, by_group), label.gather(1, by_group)
    size = members(group, real, groups).sum(-1)
    inside = label < groups
    label = label.clamp_max(groups - 1)
    place = torch.arange(order.shape[1], device=order.device) - (size.cumsum(1) - size).gather(1, label)
    return order, inside & (place < quota.gather(1, label))


@in_blocks
def prunesid(features: Tensor, score: Tensor | None, real: Tensor, keep: Tensor, most: int) -> Tensor:
    """Keeps the best of every group that are no duplicates.

    Args:
        features: `(G, N, C)`, one row per view, any float dtype; computed in float64.
        score: `(G, N)`, higher is better; None = the weight in the own group.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        most: `keep.max()` or more, a Python int.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row; ties go to the lowest index.
    """
    groups, features = (keep // 4).clamp_min(1), features.nan_to_num().double()
    group, weight = groups_of(features, real, groups, group_count(most))
    unit = F.normalize(features, dim=-1)
    ranked = suppress(unit, weight if score is None else score, group, real, keep / 32 * mean_cosine(unit, real))
    size = members(group, real, group_count(most))
    left = size & torch.zeros_like(real).scatter(1, ranked.order, ranked.survives)[:, None]
    order, chosen = ordered(ranked, group, real, group_quota(size.sum(-1), left.sum(-1), keep, keep, most))
    return torch.zeros_like(real).scatter(1, order, chosen)


@register_method("prunesid")
@dataclass(frozen=True, kw_only=True)
class PruneSID(Method):
    """The default budget is the paper's 64 of 576; positions are renumbered as the authors do."""

    score: Literal["saliency", "component"] | None = None
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 9)
    published_positions: ClassVar[PositionOption] = "renumber"
    frames_unless_told: ClassVar[FrameOption] = "each"
    card: ClassVar[Card] = Card(
        title="Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity",
        paper="PruneSID, 2026",
        venue="ICLR 2026",
        arxiv="2603.09480",
        code="github.com/ZhengyaoFang/PruneSID (no licence file, not used)",
        signals="CLS attention and output of the feature layer; without CLS its output alone",
        cost="eigenvectors of an N x N matrix in float64, N x N cosines, N steps of suppression",
        settings={
            "score": "saliency: CLS attention, as on LLaVA; component: weight in the own group, as on Qwen2-VL; None: saliency where there is CLS",
            "compat": "'authors': components drawn at random, CLS among the kept; pure functions and replay only",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("saliency", "component", None):
            raise ValueError(f"prunesid: score must be 'saliency', 'component' or None, got {self.score!r}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat == "authors":
            raise VtrError(
                "prunesid: compat='authors' draws components by torch's global random state and keeps the CLS token; it runs in scripts/replay "
                "only; leave compat out to reduce a model"
            )
        if self.score == "saliency" and not geometry.has_cls:
            raise VtrError(
                f"prunesid: score='saliency' needs a CLS token, which the tower of {geometry.host!r} has not; use score='component'"
            )
        needs = (cls_row(geometry.feature_layer),) if geometry.has_cls and self.score != "component" else ()
        return (Remove(Boundary(before_projector=True), lambda view: self._select(view, needs), needs, per="view"),)

    def _select(self, view: View, needs: tuple[Signal, ...]) -> Selection:
        score = view.signals[needs[0]] if needs else None
        return Selection(keep=prunesid(view.tokens, score, view.real, view.keep, view.most))
