"""MMTok: keep the tokens that together cover the question and the image.

Paper: MMTok, ICLR 2026, arXiv 2508.18264.
Code:  github.com/Ironieser/MMTok at d1522cd, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary. Reads: tokens on both sides of the projector, input embeddings of the instruction. Batch: any. Deterministic: yes.

1. Every text token of the instruction spreads a weight of 1 / M over the visual tokens: a softmax of its cosines to the projected tokens / tau_t.
2. Every visual token spreads alpha / N over them: a softmax of the cosines of features in front of the projector / tau_v.
3. A text or visual token is covered as well as the largest weight it gave to a kept token, 0 while none is kept.
4. Until the budget is spent, keep the visual token with which all together would be covered best.
5. Each view of an AnyRes image is treated alike, with the same text and its share of the budget.

Paper to code: tau_t -> tau_text, tau_v -> tau_vision, alpha -> alpha, coverage -> `greedy_coverage`.
Departures: the text is the whole instruction (the code drops function words on LLaVA, and puts "Question: " in front on Qwen); the padding of
AnyRes images is neither a candidate nor covered, newline tokens stay; when candidates run out the best of the others follow (the code keeps the
first token again and again); images are pruned however small; a batch of prompts is possible. Without text the visual rows decide alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.blocks import in_blocks
from vtr.ops.coverage import greedy_coverage
from vtr.ops.gather import index_to_mask
from vtr.ops.unit import unit_rows
from vtr.registry import register_method
from vtr.types import (
    Boundary,
    Budget,
    Card,
    FrameOption,
    Geometry,
    Method,
    Observe,
    PositionOption,
    Remove,
    Selection,
    Stage,
    Step,
    View,
)

FEATURES = "features"  # in front of the projector, per token
TAU_TEXT = 0.02  # LLaVA
TAU_TEXT_QWEN = 0.01


def coverage_rows(
    tokens: Tensor,
    features: Tensor,
    text: Tensor,
    real: Tensor,
    asked: Tensor,
    tau_text: float = TAU_TEXT,
    tau_vision: float = 0.2,
    alpha: float = 0.5,
) -> Tensor:
    """What the rows of text and image give to each visual token.

    Args:
        tokens: `(G, N, D)` behind the projector, any float dtype; computed in float32 at least.
        features: `(G, N, C)` in front of it.
        text: `(G, M, D)` input embeddings.
        real: `(G, N)` bool, visual tokens.
        asked: `(G, M)` bool, text tokens that count.
        tau_text, tau_vision: temperatures.
        alpha: weight of the image's rows.

    Returns:
        `(G, M + N, N)`; zero in rows and columns that are not real.
    """
    visual, words, own = (unit_rows(x, 1e-8) for x in (tokens, text, features))
    both = torch.promote_types(visual.dtype, torch.promote_types(words.dtype, own.dtype))
    visual, words, own = visual.to(both), words.to(both), own.to(both)
    logits = torch.cat([(words @ visual.mT).div_(tau_text), (own @ own.mT).div_(tau_vision)], 1)
    weights = logits.masked_fill_(~real[:, None], torch.finfo(both).min).softmax(-1)
    share = torch.cat([asked / asked.sum(1, keepdim=True).clamp_min(1), alpha * real / real.sum(1, keepdim=True).clamp_min(1)], 1)
    return weights.mul_(share[..., None].to(both)).masked_fill_(~real[:, None], 0)


def mmtok(rows: Tensor, real: Tensor, keep: Tensor, most: int, first: Tensor | None = None) -> Tensor:
    """Keeps the columns that cover the rows best.

    Args:
        rows: `(G, R, N)` as `coverage_rows` returns them.
        real: `(G, N)` bool, candidates.
        keep: `(G,)` int64, `keep <= real.sum(1)`.
        most: `keep.max()` or more as a Python int, so that nothing here waits for the device.
        first: `(G, N)` bool, tokens that go before all others; the others are only for what is left of the budget.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row; ties go to the lowest index. `O(most R N)`.
    """
    picks, _ = greedy_coverage(rows, real, most, first=first)
    return index_to_mask(picks, torch.arange(most, device=keep.device) < keep[:, None], real.shape[1])


@register_method("mmtok")
@dataclass(frozen=True, kw_only=True)
class MMTok(Method):
    """Coverage of question and image; the default budget is 64 of 576. Positions are renumbered as the authors do."""

    tau_text: float | None = None
    tau_vision: float = 0.2
    alpha: float = 0.5
    features: Literal["tower", "projected"] = "tower"

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 9)
    published_positions: ClassVar[PositionOption] = "renumber"
    frames_unless_told: ClassVar[FrameOption] = "each"
    card: ClassVar[Card] = Card(
        title="MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs",
        paper="MMTok, 2025",
        venue="ICLR 2026",
        arxiv="2508.18264",
        code="github.com/Ironieser/MMTok (Apache-2.0, not used)",
        signals="tokens on both sides of the projector, input embeddings of the instruction; no attention",
        cost="(M + N) x N cosines of a view once, then one pass over them per kept token",
        needs_text=True,
        settings={
            "tau_text": "temperature of the text's rows; None: as published, 0.01 on Qwen's models and 0.02 on others",
            "tau_vision": "temperature of the image's rows",
            "alpha": "weight of the image's rows against the text's",
            "features": "tower: the image covers itself by features in front of the projector, as published; projected: by the tokens behind it",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("tau_text", self.tau_text), ("tau_vision", self.tau_vision)):
            if value is not None and value <= 0:
                raise ValueError(f"mmtok: {name} must be above 0, got {value}")
        if self.alpha < 0:
            raise ValueError(f"mmtok: alpha must be 0 or more, got {self.alpha}; the paper uses 0.5")
        if self.features not in ("tower", "projected"):
            raise ValueError(f"mmtok: features must be 'tower' or 'projected', got {self.features!r}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        published = TAU_TEXT_QWEN if geometry.host.startswith("qwen") else TAU_TEXT
        tau = published if self.tau_text is None else self.tau_text
        choose = Remove(Boundary(), lambda view: self._select(view, tau), per="view")
        if self.features == "projected":
            return (choose,)
        return (Observe(Boundary(before_projector=True), _note_features), choose)

    def _select(self, view: View, tau: float) -> Selection:
        assert view.text is not None
        own = view.tokens if self.features == "projected" else view.per_token[FEATURES]
        settings = tau, self.tau_vision, self.alpha
        return Selection(keep=_covering(view.tokens, own, *view.text[::2], view.real, view.keep, view.most, settings))


@in_blocks
def _covering(
    tokens: Tensor, own: Tensor, text: Tensor, asked: Tensor, real: Tensor, keep: Tensor, most: int, settings: tuple[float, float, float]
) -> Tensor:
    return mmtok(coverage_rows(tokens, own, text, real, asked, *settings), real, keep, most)


def _note_features(view: View) -> None:
    view.per_token[FEATURES] = torch.where(view.real[..., None], view.tokens, 0)
