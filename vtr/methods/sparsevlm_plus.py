"""SparseVLM+: SparseVLM's raters with corrected attention of chosen heads, pruning only.

Paper: follow-up of Zhang et al., arXiv 2410.04417, by the same group (December 2025, in the same repository).
Code:  github.com/Gumpest/SparseVLMs at 26a5f48, Apache-2.0 (USE_VERSION=2_0): nothing copied, checked against its outputs.
Stage: boundary (observes), prefill. Reads: text rows of the attention of the layer before, per head. Batch: any. Deterministic: yes.

1. Raters as in SparseVLM: text tokens that the image points at, once, on the input embeddings.
2. Gravity correction: attention weights are divided by what the rotary embedding alone gives two equal vectors at that distance,
   `w = 2 / sqrt(d) sum_f cos((p - q) theta_f)`, after the softmax and without renormalising.
3. Of every head, the corrected weights of the raters are summed over the visual tokens; the best 14 heads count.
4. The score of a visual token is the mean over these heads and the raters. The best stay; nothing is recycled.
5. It happens after layers 2, 6 and 15; survivors keep their original positions.

Paper to code: w -> gravity, RETAIN_TOKN -> table.
Departures: positions are counted among the visual tokens of the image and the text behind it, without newlines and other images in between;
base and width of the rotary embedding are the model's, or a setting. Exact counts for every budget; ties go to the lowest index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vtr.methods._schedule import Tabled
from vtr.ops.raters import rated, rater_score, raters
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, Geometry, Layer, Observe, Remove, Selection, Signal, Stage, Step, View, VtrError, at_least
from vtr.types.signals import TEXT, attention

PUBLISHED = (3, 7, 16)
N = 576
TABLES = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
"""Nominal average -> tokens after each stage, of 576."""


class Rotary(NamedTuple):
    """A rotary embedding: `rotated` of the `head_dim` dimensions turn with base `base`, positions count `1 / factor`."""

    head_dim: int
    rotated: int
    base: float = 10000.0
    factor: float = 1.0


def rotary_of(geometry: Geometry, layer: int, base: float | None = None) -> Rotary:
    """The rotary embedding of an LLM layer, from the model's config; `base` overrides the config's.

    Raises:
        VtrError: there is none, or it is scaled in a way that does not turn all dimensions alike.
    """
    config = geometry.text_config
    head_dim = config.get("head_dim") or (config.get("hidden_size") or 4096) // (config.get("num_attention_heads") or 32)
    known, kinds = config.get("rope_parameters", {}), config.get("layer_types")
    if known is None:
        raise VtrError(f"sparsevlm_plus: the LLM of {geometry.host!r} has no rotary embedding to correct for; use 'sparsevlm'")
    known = known.get(kinds[layer], known) if kinds and layer < len(kinds) else known
    kind = known.get("rope_type") or "default"
    if kind not in ("default", "linear"):
        raise VtrError(
            f"sparsevlm_plus: the rotary embedding of {geometry.host!r} is scaled by {kind!r}, only 'linear' is known; use 'sparsevlm'"
        )
    rotated = int(head_dim * (known.get("partial_rotary_factor") or 1.0))
    factor = known.get("factor") or 1.0 if kind == "linear" else 1.0
    return Rotary(head_dim, rotated, base or known.get("rope_theta") or 10000.0, factor)


def gravity(query: Tensor, key: Tensor, head_dim: int, base: float = 10000.0, rotated: int | None = None, factor: float = 1.0) -> Tensor:
    """Product of two all-ones vectors after the rotary embedding, over sqrt(d): `(..., R, N)` float64.

    `query (..., R)` and `key (..., N)` are positions; only their differences matter. `O(R N d)`, no `(R, N, d)` tensor.

    Args:
        query, key: see above.
        head_dim: d.
        base: of the frequencies.
        rotated: how many dimensions turn, None = all; the others count 1 each.
        factor: by which positions are divided (linear scaling).
    """
    rotated = head_dim if rotated is None else rotated
    half = rotated // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64, device=query.device) / half) / factor

    def waves(position: Tensor) -> Tensor:
        angle = position.double()[..., None] * frequency
        return torch.cat([angle.cos(), angle.sin()], -1)

    return head_dim**-0.5 * (2 * (waves(query) @ waves(key).mT) + head_dim - rotated)


def corrected_score(rows: Tensor, by: Tensor, real: Tensor, pull: Tensor, heads: int) -> Tensor:
    """Steps 2 to 4.

    Args:
        rows: `(G, H, M, N)` attention of each text token to each visual token, after the softmax.
        by: `(G, M)` bool, raters.
        real: `(G, N)` bool.
        pull: `(G, M, N)`, as `gravity` gives it.
        heads: how many heads count.

    Returns:
        `(G, N)` in float64; ties between heads go to the lowest.
    """
    chosen = by[:, :, None] & real[:, None]
    light = torch.where(chosen[:, None], rows.double() / pull[:, None], 0)  # (G, H, M, N)
    strength = light.sum((2, 3))
    count = torch.full_like(real[:, 0], min(heads, rows.shape[1]), dtype=torch.int64)
    best = topk_mask(strength, torch.ones_like(strength, dtype=torch.bool), count)
    mean = torch.where(best[..., None, None], light, 0).sum(1) / count[:, None, None]
    return rated(mean, by)


@register_method("sparsevlm_plus")
@dataclass(frozen=True, kw_only=True)
class SparseVLMPlus(Tabled):
    """Version 2.0 of the repository; the default budget is what its 192-token schedule leaves in the end, 118 of 576."""

    heads: int = 14
    rope_base: float | None = None

    tables, published, of = TABLES, PUBLISHED, N
    stages: ClassVar[tuple[Stage, ...]] = ("boundary", "prefill")
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=TABLES[192][-1] / N)
    card: ClassVar[Card] = Card(
        title="SparseVLM+: Visual Token Sparsification with corrected text-visual attention",
        paper="Zhang et al., 2025 (follow-up)",
        venue="code of Dec 2025",
        arxiv="2410.04417",
        code="github.com/Gumpest/SparseVLMs (Apache-2.0, not used)",
        signals="input embeddings of text and image; attention of the text tokens in three layers, per head",
        cost="text x visual products once; one slab of attention rows of three layers, per head",
        needs_text=True,
        settings={
            "table": "published schedule whose shape is used: 192, 128, 96 or 64; None: the one nearest to the budget",
            "layers": "the three layers from whose input on tokens are gone (the paper's 2, 6, 15 plus 1); None: 3, 7, 16 of 32, same depth",
            "counts": "tokens after each stage of an image with the most tokens of the model; instead of a budget",
            "heads": "heads that count, all where the model has fewer",
            "rope_base": "base of the rotary embedding; None: that of the LLM",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "heads", 1, "; the code uses 14")
        if self.rope_base is not None and not self.rope_base > 0:
            raise ValueError(f"{self.name}: rope_base must be above 0, got {self.rope_base}; None takes the model's, LLaMA uses 10000")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        layers, shares = self.schedule(geometry)
        stages = []
        for layer, share in zip(layers, shares, strict=True):
            rows = attention(layer - 1, queries=TEXT, heads=True)
            rotary = rotary_of(geometry, layer - 1, self.rope_base)
            stages.append(Remove(Layer(layer), partial(self._select, rows, rotary), (rows,), share=share))
        return Observe(Boundary(), _find_raters), *stages

    def _select(self, rows: Signal, rotary: Rotary, view: View) -> Selection:
        assert view.text is not None
        place, behind = view.per_token["place"], view.memory["behind"]
        if self.position_ids == "renumber":
            place, behind = _places(view)
        words = behind[:, None] + view.text.instruction.long().cumsum(1) - 1
        pull = gravity(words, place, rotary.head_dim, rotary.base, rotary.rotated, rotary.factor)
        score = corrected_score(view.signals[rows], view.memory["raters"], view.real, pull, self.heads)
        return Selection(keep=topk_mask(score, view.real, view.keep))


def _places(view: View) -> tuple[Tensor, Tensor]:
    """Position `(G, N)` of each visual token in its image, and of the first text token behind it `(G,)`."""
    return view.real.long().cumsum(1) - 1, view.real.sum(1)


def _find_raters(view: View) -> None:
    assert view.text is not None
    score = rater_score(view.tokens, view.text.tokens, view.real, view.text.instruction)
    view.memory["raters"] = raters(score, view.text.instruction)
    view.per_token["place"], view.memory["behind"] = _places(view)
