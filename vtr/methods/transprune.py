"""TransPrune: drop visual tokens that the LLM's blocks change little and that the instruction does not look at, in three stages.

Paper: Li et al., CVPR 2026, arXiv 2507.20630 v2, Section 3.
Code:  github.com/liaolea/TransPrune at c9e8284, MIT: nothing copied, checked against its outputs.
Stage: prefill. Reads: attention and MLP inputs and outputs of six layers, queries and keys of the three layers that drop. Batch: any.

1. Transition of a token in a block: `m = |out| / |in|` and `c = 1 - cos(in, out)`; its weight is `m exp(c) / sum exp(c)` over the prompt.
2. The token transition variation (TTV) of a layer is that of its attention plus that of its MLP, both without the residual. It is summed over
   layers 7 to 12 (counted from 1) as far as they have run; what was summed of a token stays with it.
3. Instruction-guided attention (IGA): the softmax attention that the text behind the image would pay to a visual token in the layer that drops,
   mean over heads and text.
4. TTV and IGA are divided by their sums over the image and added. The best stay.
5. It happens after layers 7, 9 and 12, counted from 1, and leaves 7/8, 5/8 and 1/8; positions are renumbered.

Paper to code: P -> layers (7, 9, 12 counted from 0 and gone from the input of), rho -> shares of the way from keep to N, alpha -> 1/2 dropped.
Departures: the softmax of step 1 runs over the own prompt, where the code takes the whole batch in; newline tokens have no part in it and are
not ranked. Exact counts, where the code cuts `N rho` down. The paper states `1 - |cos|`; the code and the default take the signed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods._schedule import Scheduled
from vtr.ops.prompt_rows import causal_text, prompt_rows
from vtr.ops.raters import rated
from vtr.ops.schedule import scaled_layers
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import Budget, Card, Geometry, Layer, Observe, PerToken, PositionOption, Remove, Selection, Signal, Stage, Step, View
from vtr.types.signals import TEXT, attention, attention_io, mlp_io, next_keys, next_queries

PUBLISHED = (7, 9, 12)
RATIOS = (0.875, 0.625, 0.125)
"""The paper's "High" setting; its "Low" one is not published."""
TTV = "ttv"


class Score(NamedTuple):
    """`total = ttv + iga`, `(G, N)` each; both parts sum to 1 over an image."""

    total: Tensor
    ttv: Tensor
    iga: Tensor


def transition(entered: Tensor, left: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """How a block changes a token: `m (...,)` and `exp(c) (...,)` of `entered` and `left (..., D)`, in float32 at least."""
    wide = torch.promote_types(entered.dtype, torch.float32)
    entered, left = entered.to(wide), left.to(wide)
    cosine = F.cosine_similarity(entered, left, dim=-1, eps=1e-8)
    size = torch.linalg.vector_norm(entered, dim=-1).clamp_min(torch.finfo(wide).tiny)
    return torch.linalg.vector_norm(left, dim=-1) / size, (1 - (cosine.abs() if absolute else cosine)).exp()


def transition_weight(
    entered: PerToken, left: PerToken, real: Tensor, text_real: Tensor, row: Tensor, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """Step 1 for one block.

    Args:
        entered, left: `visual (G, N, D)` and `text (G, M, D)` in front of and behind the block.
        real: `(G, N)` bool.
        text_real: `(G, M)` bool.
        row: `(G,)` int64, prompt of each group; its images are summed together, its text once.
        absolute: 1 - |cos| instead of 1 - cos.

    Returns:
        Weights of the visual tokens `(G, N)` and of the text `(G, M)`.
    """
    change, turn = transition(entered.visual, left.visual, absolute)
    text_change, text_turn = transition(entered.text, left.text, absolute)
    images = torch.where(real, turn, 0).sum(1)
    same = (row[:, None] == row).to(images.dtype)
    total = (same @ images + torch.where(text_real, text_turn, 0).sum(1))[:, None]
    return change * turn / total, text_change * text_turn / total


def transprune_score(ttv: Tensor, rows: Tensor, by: Tensor, real: Tensor) -> Score:
    """Step 4.

    Args:
        ttv: `(G, N)`, summed over layers.
        rows: `(G, M, N)` attention of the text to the visual tokens, mean over heads.
        by: `(G, M)` bool, the text behind the image.
        real: `(G, N)` bool.
    """

    def shares(values: Tensor) -> Tensor:
        values = torch.where(real, values, 0)
        return values / (values.sum(1, keepdim=True) + 1e-8)

    ttv, iga = shares(ttv), shares(rated(rows, by))
    return Score(ttv + iga, ttv, iga)


@register_method("transprune")
@dataclass(frozen=True, kw_only=True)
class TransPrune(Scheduled):
    """Token transition pruning; the default is the paper's High setting, whose last stage leaves 1/8."""

    abs_cos: bool = False

    stages: ClassVar[tuple[Stage, ...]] = ("prefill",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=RATIOS[-1])
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
        paper="Li et al., 2026",
        venue="CVPR 2026",
        arxiv="2507.20630",
        code="github.com/liaolea/TransPrune (MIT, not used)",
        signals="inputs and outputs of attention and MLP in six layers; attention of the text in the layers that drop, computed once more",
        cost="norms and cosines of six layers, O(S D) each; norm, projections and text rows of three layers a second time",
        needs_text=True,
        settings={
            "layers": "the three layers from whose input on tokens are gone (the paper's 7, 9, 12, counted from 1, are the same numbers); None: "
            "these of 32, same relative depth elsewhere; TTV is summed from the layer before the first of them",
            "counts": "keep counts after each drop, of an image with the most tokens of the model; instead of a budget",
            "abs_cos": "1 - |cos| as the paper writes, instead of 1 - cos as the code computes",
        },
    )

    def schedule(self, geometry: Geometry) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Layers, and the share of the way from keep to N that each drop leaves."""
        try:
            layers = self.layers or scaled_layers(PUBLISHED, geometry.llm_layers)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; use 'fastv', which removes once") from error
        return layers, self.shares(geometry, RATIOS)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        layers, shares = self.schedule(geometry)
        steps: list[Step] = []
        for layer in range(layers[0], layers[-1] + 1):
            blocks = attention_io(layer - 1), mlp_io(layer - 1)
            steps.append(Observe(Layer(layer), partial(self._accumulate, blocks), blocks))
            if layer in layers:
                # logits of the layer before are -inf where a text token comes before an image of the same prompt
                needs = next_queries(), next_keys(), attention(layer - 1, queries=TEXT, softmax=False)
                steps.append(Remove(Layer(layer), partial(_select, needs), needs, share=shares[layers.index(layer)]))
        return tuple(steps)

    def _accumulate(self, blocks: Sequence[Signal], view: View) -> None:
        assert view.text is not None
        for block in blocks:
            entered, left = view.signals[block]
            weight = transition_weight(entered, left, view.real, view.text.real, view.row, self.abs_cos)[0]
            view.per_token[TTV] = view.per_token[TTV] + weight if TTV in view.per_token else weight


def _select(needs: tuple[Signal, Signal, Signal], view: View) -> Selection:
    assert view.text is not None
    text, (query, key, logits) = view.text, (view.signals[need] for need in needs)
    visible = ~logits.isneginf() & view.real[:, None]
    rows = prompt_rows(
        query.text,
        key.visual,
        key.text,
        view.real,
        text.real,
        view.row,
        sees_text=causal_text(text.real),
        sees_visual=visible,
        scaling=view.scaling.get(needs[0]),
    )
    behind = text.instruction & visible.any(2)
    return Selection(keep=topk_mask(transprune_score(view.per_token[TTV], rows, behind, view.real).total, view.real, view.keep))
