"""DART: keep the visual tokens that duplicate a few pivot tokens least.

Paper: Wen et al., EMNLP 2025, arXiv 2502.11494 v2, Section 3.
Code:  github.com/ZichenWen1/DART at 5a19452, Apache-2.0: nothing copied, checked against its outputs.
Stage: prefill (or boundary). Reads: keys of the layer before, the tokens behind the LLM's final norm. Batch: any.

1. The strength of a token is the L1 norm of its key (all heads, after the rotary embedding) in the layer before.
2. Pivots are the 4 strongest visual tokens, which stay, and the 4 strongest text tokens of the instruction.
3. Every pivot gets an equal share of the remaining budget; a remainder goes one each to the first pivots.
4. Pivot after pivot, in ascending position, moves the visual tokens of lowest cosine similarity to it from the candidates to the kept.
5. The kept tokens keep their order and their position ids.

With `stage="boundary"` steps 1 and 4 read the input embeddings instead, as serving engines do that cannot cut inside the LLM.

Paper to code: K -> layer, R -> keep, P_image and P_text -> pivots_image and pivots_text, M -> quota.
Departure: `keep` is exact where the code keeps 4 to 11 more or fewer (it counts the image pivots on top of rounded quotas), and pivots are
visited by position where the code iterates a Python set of positions. `scripts/replay/dart.py` has the code's versions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.gather import index_to_mask, left_align, take
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import Boundary, Budget, Card, Geometry, Layer, Method, Remove, Selection, Stage, Step, View, VtrError, at_least
from vtr.types.signals import keys


def dart(tokens: Tensor, candidates: Tensor, pivots: Tensor, quota: Tensor) -> Tensor:
    """Pivot after pivot, take the candidates least similar to it.

    Args:
        tokens: visual tokens `(G, N, D)` behind the final norm, any float dtype; cosines are computed in float32.
        candidates: `(G, N)` bool, visual tokens that are no pivots.
        pivots: `(G, P, D)` in the order they are visited, behind the final norm.
        quota: `(G, P)` int64, tokens each pivot takes; fewer where the candidates run out.

    Returns:
        `(G, N)` bool, the tokens taken. Ties: lowest index. No host sync.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    similarity = F.normalize(pivots.to(wide), dim=-1, eps=1e-8) @ F.normalize(tokens.to(wide), dim=-1, eps=1e-8).mT  # (G, P, N)
    order = similarity.nan_to_num(torch.inf, torch.inf, -torch.inf).argsort(dim=-1, stable=True)
    taken = torch.zeros_like(candidates)
    for pivot in range(pivots.shape[1]):
        ranked = order[:, pivot]
        free = (candidates & ~taken).gather(1, ranked)
        chosen = free & (free.cumsum(1) <= quota[:, pivot, None])
        taken = taken | torch.zeros_like(taken).scatter_(1, ranked, chosen)
    return taken


def l1_norm(states: Tensor) -> Tensor:
    """Sum of absolute values of `states (G, N, E)`, `(G, N)` float32."""
    return torch.linalg.vector_norm(states, 1, dim=-1, dtype=torch.promote_types(states.dtype, torch.float32))


def strongest(strength: Tensor, real: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Pivots of each row in ascending position.

    `strength (G, N)`, `real (G, N)` bool, `count (G,)` int64 wanted, `most` the largest of them as a Python int. Returns
    `index (G, P)` int64 with `P = min(most, N)` and `real (G, P)` bool; ties: lowest index.
    """
    return left_align(topk_mask(strength, real, count), min(most, strength.shape[1]))


def exact_quota(budget: Tensor, pivots: Tensor) -> Tensor:
    """Shares `budget (G,)` over the real ones of `pivots (G, P)` bool: equal parts, the remainder to the first. Returns `(G, P)` int64."""
    number = pivots.sum(1).clamp_min(1)
    rank = pivots.long().cumsum(1) - 1
    return torch.where(pivots, (budget // number)[:, None] + (rank < (budget % number)[:, None]), 0)


@register_method("dart")
@dataclass(frozen=True, kw_only=True)
class DART(Method):
    """Duplication-aware pruning; the default budget is the paper's 128 of 576 (and 640 of 2880)."""

    stage: Literal["prefill", "boundary"] = "prefill"
    layer: int = 2
    pivots_image: int = 4
    pivots_text: int = 4
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "boundary")
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=2 / 9)
    card: ClassVar[Card] = Card(
        title="DART: Duplication-Aware Reduction of Tokens",
        paper="Wen et al.: Stop Looking for 'Important Tokens' in Multimodal Language Models: Duplication Matters More",
        venue="EMNLP 2025",
        arxiv="2502.11494",
        code="github.com/ZichenWen1/DART",
        signals="keys of the LLM layer before the cut, visual tokens behind the final norm; no attention map",
        cost="one P x D x N product and P sorts of N, once; layers before the cut run at full length",
        needs_text=True,
        settings={
            "stage": "prefill: inside the LLM; boundary: before it, on input embeddings (a variant of serving engines)",
            "layer": "LLM layer from whose input on the tokens are gone; ignored at the boundary",
            "pivots_image": "strongest visual tokens that stay and that others are compared with",
            "pivots_text": "strongest text tokens of the instruction that others are compared with",
            "compat": "'authors': the released visiting order and counts; pure functions and replay only",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in ("prefill", "boundary"):
            raise ValueError(f"dart: stage must be 'prefill' or 'boundary', got {self.stage!r}")
        at_least(self, "layer", 1, "; use stage='boundary' to prune before layer 0")
        if self.pivots_image < 0 or self.pivots_text < 0 or self.pivots_image + self.pivots_text < 1:
            raise ValueError(f"dart: needs at least one pivot, got pivots_image={self.pivots_image}, pivots_text={self.pivots_text}")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat == "authors":
            raise VtrError(
                "dart: compat='authors' visits pivots by a Python set of sequence positions, one prompt at a time; it runs in "
                "scripts/replay only; leave compat out to reduce a model"
            )
        if self.stage == "boundary":
            return (Remove(Boundary(), self._at_boundary),)
        if self.layer >= geometry.llm_layers:
            raise ValueError(
                f"dart: layer={self.layer} is not one of the LLM's layers 1 to {geometry.llm_layers - 1}; the paper's 'after the second "
                "layer' is layer=2"
            )
        return (Remove(Layer(self.layer), self._in_llm, (keys(self.layer - 1),), final_norm=True),)

    def _in_llm(self, view: View) -> Selection:
        (found,) = view.signals.values()
        assert view.final_norm is not None
        return self._select(view, found.visual.flatten(2), found.text.flatten(2), view.final_norm)

    def _at_boundary(self, view: View) -> Selection:
        assert view.text is not None
        return self._select(view, view.tokens, view.text.tokens, lambda tokens: tokens)

    def _select(self, view: View, visual: Tensor, textual: Tensor, norm: Callable[[Tensor], Tensor]) -> Selection:
        """`visual (G, N, E)` and `textual (G, M, E)` are what strength is measured on."""
        assert view.text is not None
        instruction, least = view.text.instruction, max(self.pivots_image, 1)
        limit = torch.where(instruction.any(1), self.pivots_image, least)  # without text there must be an image pivot
        image, image_real = strongest(l1_norm(visual), view.real, view.keep.minimum(limit), least)
        text, text_real = strongest(l1_norm(textual), instruction, torch.full_like(view.keep, self.pivots_text), self.pivots_text)
        stays = index_to_mask(image, image_real, view.real.shape[1])
        tokens = norm(view.tokens)
        pivots = torch.cat([take(tokens, image), norm(take(view.text.tokens, text))], 1)
        quota = exact_quota(view.keep - stays.sum(1), torch.cat([image_real, text_real], 1))
        return Selection(keep=stays | dart(tokens, view.real & ~stays, pivots, quota))
