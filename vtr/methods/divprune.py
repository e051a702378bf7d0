"""DivPrune: keep the visual tokens that lie farthest apart.

Paper: Alvar et al., CVPR 2025, arXiv 2503.02175, Section 3.
Code:  github.com/vbdi/divprune at 799e2d9, CC BY-NC: nothing copied, checked against its outputs.
Stage: boundary. Reads: visual tokens. Batch: any. Deterministic: yes.

1. The distance of two tokens is 1 - cosine.
2. The first token kept is the one whose nearest neighbour is farthest away.
3. Until the budget is spent, keep the token farthest from everything kept so far.

Paper to code: r -> keep_ratio, d_ij -> distance, M -> keep.
Departures: a kept token is never picked again (the authors' code can pick one of several identical tokens twice; without duplicates the
result is the same), newline tokens are not candidates, zero vectors do not give NaN, distances are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.blocks import in_blocks
from vtr.ops.farthest import cosine_distance_rows, farthest_first
from vtr.ops.gather import index_to_mask
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, Geometry, Method, PositionOption, Remove, Selection, Stage, Step, View, VtrError


def divprune(tokens: Tensor, real: Tensor, keep: Tensor, most: int, repeat: bool = False) -> Tensor:
    """Chooses tokens so that the smallest distance between any two of them is large.

    Args:
        tokens: visual tokens `(G, N, D)`, one row per image, any float dtype; distances are computed in float32.
        real: `(G, N)` bool, True where a row has a token.
        keep: keep count of each image `(G,)` int64, `1 <= keep <= real.sum(1)`.
        most: `keep.max()` as a Python int, so that nothing here waits for the device.
        repeat: as the authors' code, which may pick a token again once only duplicates of kept ones are left.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row (`repeat`: at most). `O(N^2 D + most N)`.
    """
    picks, _ = divprune_picks(tokens, real, most, repeat)
    return index_to_mask(picks, torch.arange(most, device=keep.device) < keep[:, None], real.shape[1])


@in_blocks
def divprune_picks(tokens: Tensor, real: Tensor, most: int, repeat: bool = False) -> tuple[Tensor, Tensor]:
    """The first `most` picks `(G, most)` int64 in order, and the distance of each token to its nearest other `(G, N)` (step 2)."""
    distances, nearest_other = cosine_distance_rows(tokens, real)
    return farthest_first(nearest_other.argmax(1), distances, real, most, repeat), nearest_other


@register_method("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """The default budget is the paper's 9.8 % (56 of 576); positions are renumbered as the authors do."""

    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.098)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        paper="Alvar et al., 2025",
        venue="CVPR 2025",
        arxiv="2503.02175",
        code="github.com/vbdi/divprune (CC BY-NC, not used)",
        signals="visual tokens",
        cost="O(N^2 D) distances once, O(N) per kept token",
        settings={"compat": "'authors' lets a token be picked twice when only duplicates are left; it is then kept once"},
    )

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat and geometry.anyres:
            raise VtrError("divprune: compat='authors' ranks newline tokens, which are no visual tokens here; leave compat out for AnyRes")
        return (Remove(Boundary(), self._select),)

    def _select(self, view: View) -> Selection:
        return Selection(keep=divprune(view.tokens, view.real, view.keep, view.most, repeat=self.compat is not None))
