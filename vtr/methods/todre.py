"""ToDRE: keep the visual tokens that differ most from each other, then drop them all once the LLM no longer looks at them.

Paper: Li et al., arXiv 2505.18757 v2, Sections 3.2 and 3.3.
Code:  none published. Checked against a float64 reference of the project's own.
Stage: boundary, then one LLM layer. Reads: visual tokens, CLS attention of the last tower layer; attention of one LLM layer. Batch: any.

1. The pivot is the token that the CLS token attends to most in the last tower layer; of an AnyRes image, the best of the thumbnail.
2. Tokens become unit vectors. The pivot is picked first.
3. Until the budget is spent, pick the token whose sum of similarities to everything picked is smallest.
4. After `floor(7 L / 8)` of L LLM layers, measure in the last of them how much attention goes from text to visual tokens and back.
5. Where both shares are below tau, all visual tokens of that prompt leave the later layers; the cache of the earlier ones stays.

Paper to code: k -> keep, a_t2v and a_v2t -> the two results of `cross_attention_shares`, tau -> tau, l = 7L/8 -> layer.
Departure: none known. Open in the paper and settled here: heads are averaged after the softmax, survivors keep the order of
their positions, the layer is rounded down. Without a CLS token the pivot is a random one, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.gather import index_to_mask
from vtr.ops.hashing import random_key
from vtr.ops.maxsum import greedy_max_sum
from vtr.registry import register_method
from vtr.types import (
    Boundary,
    Budget,
    Card,
    Geometry,
    Layer,
    Method,
    PositionOption,
    Remove,
    Selection,
    Signal,
    Stage,
    Step,
    View,
    VtrError,
    at_least,
)
from vtr.types.signals import TEXT, VISUAL, attention, cls_row

Pivot = Literal["auto", "cls", "farthest", "center", "random"]
PIVOTS: tuple[Pivot, ...] = ("auto", "cls", "farthest", "center", "random")


def todre(tokens: Tensor, real: Tensor, keep: Tensor, most: int, pivot: Tensor) -> Tensor:
    """Stage 1: choose tokens so that the sum of the similarities between them is small.

    Args:
        tokens: visual tokens `(G, N, D)`, one row per image, any float dtype; similarities are summed in float32.
        real: `(G, N)` bool, True where a row has a token.
        keep: keep count of each image `(G,)` int64, `1 <= keep <= real.sum(1)`.
        most: `keep.max()` as a Python int, so that nothing here waits for the device.
        pivot: `(G,)` int64, the token picked first.

    Returns:
        Keep mask `(G, N)` bool with exactly `keep` True per row.
    """
    order = greedy_max_sum(tokens, real, pivot, most)  # (G, most)
    picked = torch.arange(most, device=order.device) < keep[:, None]
    return index_to_mask(order, picked, tokens.shape[1])


def cls_pivot(attention: Tensor, real: Tensor, thumbnail: Tensor) -> Tensor:
    """The best attended token `(G,)` int64 of the thumbnail, of all tokens where no thumbnail token is left; ties: lowest index.

    `attention (G, N)` from CLS to patches; `real` and `thumbnail (G, N)` bool. Without AnyRes, and for the frames of a video,
    every token belongs to the thumbnail.
    """
    candidates = real & thumbnail
    candidates = torch.where(candidates.any(1, keepdim=True), candidates, real)
    return attention.float().nan_to_num(0.0).masked_fill(~candidates, -torch.inf).argmax(1)


def mean_pivot(tokens: Tensor, real: Tensor, farthest: bool) -> Tensor:
    """The token `(G,)` int64 that is least (or most) similar to the mean of all unit vectors; ties: lowest index."""
    unit = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1, eps=1e-12) * real[..., None]
    similarity = torch.einsum("gnd,gd->gn", unit, F.normalize(unit.sum(1), dim=-1, eps=1e-12)).nan_to_num()
    return (-similarity if farthest else similarity).masked_fill(~real, -torch.inf).argmax(1)


def cross_attention_shares(text_rows: Tensor, visual_rows: Tensor, real: Tensor, instruction: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Stage 2: attention from text to visual tokens and back, as shares of all attention of the queries.

    Args:
        text_rows: `(G, M, N)` attention of each text token to the visual tokens of one image, mean over heads.
        visual_rows: `(G, N, M)` attention of each visual token to the text tokens.
        real: `(G, N)` bool, visual tokens.
        instruction: `(G, M)` bool, text tokens without the system prompt.
        row: `(G,)` int64, the prompt of each image; the images of one prompt are counted together.

    Returns:
        `a_t2v` and `a_v2t`, `(G,)` each, equal for the images of one prompt; a prompt without text counts as fully attended.
    """
    pair = real[:, :, None] & instruction[:, None]  # (G, N, M)
    to_visual = torch.where(pair.mT, text_rows.to(torch.promote_types(text_rows.dtype, torch.float32)), 0).sum((1, 2))
    to_text = torch.where(pair, visual_rows.to(torch.promote_types(visual_rows.dtype, torch.float32)), 0).sum((1, 2))
    together = (row[:, None] == row).to(to_visual.dtype)  # (G, G)
    asked, seen = instruction.sum(1), together @ real.sum(1).to(to_visual.dtype)
    t2v = torch.where(asked > 0, together @ to_visual / asked.clamp_min(1), 1.0)
    return t2v, together @ to_text / seen.clamp_min(1)


@register_method("todre")
@dataclass(frozen=True, kw_only=True)
class ToDRE(Method):
    """Diversity before the LLM, relevance late inside it; the default budget is the paper's 25 %."""

    tau: float = 0.1
    layer: int | None = None
    pivot: Pivot = "auto"
    seed: int = 0

    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "prefill")
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.25)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance",
        paper="Li, Yang, Zhang, Shao, Lu: ToDRE, 2025 (v2)",
        venue="preprint",
        arxiv="2505.18757",
        signals="visual tokens, CLS attention of the last tower layer, attention between text and visual tokens of one LLM layer",
        cost="N x N similarities once, then O(keep N); two slabs of attention rows of one LLM layer",
        settings={
            "tau": "stage 2 removes every visual token where both attention shares are below tau; 0 switches stage 2 off",
            "layer": "LLM layer from which on stage 2 removes; None: floor(7 L / 8) of L layers",
            "pivot": "first pick: cls (attention), farthest from the mean, center (nearest to it), random; auto: cls, without CLS random",
            "seed": "of the random pivot",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivot not in PIVOTS:
            raise ValueError(f"todre: pivot must be one of {', '.join(PIVOTS)}, got {self.pivot!r}")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"todre: tau must be in [0, 1], got {self.tau}; the paper uses 0.1, 0 switches stage 2 off")
        at_least(self, "layer", 1, "; stage 2 reads the attention of the layer before")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        pivot = ("cls" if geometry.has_cls else "random") if self.pivot == "auto" else self.pivot
        if pivot == "cls" and not geometry.has_cls:
            raise VtrError(f"todre: pivot='cls' needs a tower with a CLS token, host {geometry.host!r} has none; use pivot='farthest'")
        cls = cls_row(geometry.tower_layers - 1)
        first = Remove(Boundary(), lambda view: self._diversify(view, pivot, cls), (cls,) if pivot == "cls" else ())
        if self.tau == 0:
            return (first,)
        depth = geometry.llm_layers
        layer = max(7 * depth // 8, 1) if self.layer is None else self.layer
        if layer >= depth:
            raise ValueError(f"todre: layer {layer} is not one of the LLM's layers 1 to {depth - 1}; tau=0 leaves stage 2 out")
        rows = attention(layer - 1, queries=TEXT), attention(layer - 1, queries=VISUAL, keys=TEXT)
        return first, Remove(Layer(layer), lambda view: self._fade(view, *rows), rows, counted=False)

    def _diversify(self, view: View, pivot: str, cls: Signal) -> Selection:
        if pivot == "cls":
            first = cls_pivot(view.signals[cls], view.real, view.cells[..., 0] == 0)
        elif pivot == "random":
            key = random_key(self.seed, view.checksum, view.patch)
            first = key.masked_fill(~view.real, torch.iinfo(torch.int64).max).argmin(1)
        else:
            first = mean_pivot(view.tokens, view.real, pivot == "farthest")
        return Selection(keep=todre(view.tokens, view.real, view.keep, view.most, first))

    def _fade(self, view: View, from_text: Signal, from_visual: Signal) -> Selection:
        assert view.text is not None
        t2v, v2t = cross_attention_shares(view.signals[from_text], view.signals[from_visual], view.real, view.text.instruction, view.row)
        faded = (t2v < self.tau) & (v2t < self.tau)
        return Selection(keep=view.real & ~faded[:, None])

    @classmethod
    def identity(cls, n: int) -> Method:
        return cls(keep=n, tau=0.0)
