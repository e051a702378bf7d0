"""FlowCut: prune in the vision tower, layer by layer, the patches that little information flows from.

Paper: Tong et al., NeurIPS 2025, arXiv 2505.19536, Section 4.
Code:  github.com/TungChintao/FlowCut at a2ecd24, Apache-2.0: nothing copied, checked against its outputs.
Stage: tower, and for images of many tokens one LLM layer. Reads: the CLS row of attention, values; in the LLM the last row. Batch: any.

1. After tower layer i a patch scores (attention from CLS / its sum + semantic row / its sum) * strength, where the semantic row is the
   softmax of the CLS value against all values, and strength is the L1 norm of the head-mean value.
2. Scores accumulate over layers: half the old, half the new.
3. Every second layer the lowest are pruned. Their number is `(N - T) / sqrt(r) * (1 - (H / ln N)^2)` with H the entropy of the CLS
   attention and r the layers still to come; all views of an image share the largest number. At r = 0 exactly T are left.
4. An AnyRes image leaves the tower with T / 2 patches per view, one that has a grid of its own (Qwen-VL) with 2 T tokens. LLM layer 2 keeps
   the best T of them by the last prompt token's attention and values.
5. Without a CLS token the attention row is that of the mean query, and there is no semantic row.

Paper to code: T -> keep, S_attn -> attention, S_sem -> semantic, I -> strength, r = f - 1 - i with f the layer whose output is used.
Departure: the views of one image share a number where the code shares it over the batch; the entropy takes 0 ln 0 as 0; padding of
AnyRes images is no candidate, where the code loses that part of the budget; images keep exactly T; where the last layer gives the features
(Qwen-VL), the last pruning is in front of it, where the code prunes behind it. As in the code and unlike the paper, the
softmax runs over CLS and patches per head, the tower's semantic row is not scaled, and the number pruned is a count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.attention_rows import products
from vtr.ops.blocks import in_blocks
from vtr.ops.gather import take
from vtr.ops.parts import members, of_part, part_sum, topk_per_part
from vtr.ops.precision import widened
from vtr.ops.topk import quota, topk_mask
from vtr.registry import register_method
from vtr.types import (
    Budget,
    Card,
    FrameOption,
    Geometry,
    Layer,
    Method,
    Observe,
    PositionOption,
    Remove,
    Selection,
    Signal,
    Stage,
    Step,
    Tower,
    View,
    VtrError,
)
from vtr.types.signals import LAST, attention, cls_row, cls_values, pooled_row, values

STATE = "flowcut"  # accumulated scores, per token
KEEP = "keep"  # what each image is to have in the end
WIDER = 2  # times T leave the tower where every image has a grid of its own; FlowCut_Qwen at a2ecd24


def flowcut(cumulative: Tensor, amount: Tensor, part: Tensor, real: Tensor, target: Tensor) -> Tensor:
    """Prune the lowest of every view, the same number in all views of an image.

    Args:
        cumulative: accumulated score `(G, N)`, higher stays.
        amount: `(G, P)` float from `prune_amount`; infinite to prune down to `target` at once.
        part: `(G, N)` int64, view of each patch.
        real: `(G, N)` bool, candidates.
        target: `(G, P)` int64, patches of each view that are left in the end.

    Returns:
        Keep mask `(G, N)` bool; a view keeps the larger of its target and what it has minus the largest `amount`, rounded half to even.
    """
    number = members(part, real, target.shape[1]).sum(-1)
    pruned = amount.amax(1, keepdim=True).clamp(0, part.shape[1]).round().long()
    return topk_per_part(cumulative, part, real, torch.where(number > target, (number - pruned).maximum(target), number))


def prune_amount(attention: Tensor, part: Tensor, real: Tensor, target: Tensor, remaining: int, eps: float | None = None) -> Tensor:
    """How many patches each view would prune, not rounded: `(G, P)` float32, 0 where a view is at its target.

    Args:
        attention: `(G, N)` attention row of CLS (or of the mean query).
        part, real, target: as for `flowcut`.
        remaining: r, layers still to come; infinite amounts at 0.
        eps: the entropy of the authors' Qwen code, `-sum a ln(a + eps)` without normalising; None: `-sum p ln p`, p = a / sum a.
    """
    member = members(part, real, target.shape[1])
    number = member.sum(-1)
    room = (number - target).clamp_min(0).float()
    if remaining == 0:
        return torch.full_like(room, torch.inf)
    if eps is None:
        share = attention / of_part(part_sum(attention, member), part)
        entropy = -part_sum(torch.xlogy(share, share), member)
    else:
        entropy = -part_sum(attention * (attention + eps).log(), member)
    evenness = entropy / number.clamp_min(2).float().log()
    return (room / remaining**0.5 * (1 - evenness**2)).nan_to_num(0.0)


@in_blocks
def value_strength(values: Tensor) -> Tensor:
    """L1 norm of the head-mean value: `(G, N, H, d)` -> `(G, N)` float32."""
    return values.mean(2, dtype=torch.promote_types(values.dtype, torch.float32)).abs_().sum(-1)


def semantic_row(values: Tensor, cls_values: Tensor, part: Tensor, real: Tensor) -> Tensor:
    """Softmax of each view's CLS value against the values of CLS and patches, not scaled; mean over heads, CLS cut off.

    `values (G, N, H, d)`, `cls_values (G, P, H, d)`, `part (G, N)`, `real (G, N)` -> `(G, N)` float32.
    """
    values, cls_values = widened(values), widened(cls_values)
    every = products(cls_values.transpose(1, 2), values.transpose(1, 2))  # (G, H, P, N)
    own = cls_values.square().sum(-1).mT  # (G, H, P)
    if every.shape[2] == 1:
        logits = torch.cat([every[:, :, 0].masked_fill(~real[:, None], -torch.inf), own], 2)
        return logits.softmax(2)[..., :-1].mean(1)
    heads = every.shape[1]
    of_token = part[:, None].expand(-1, heads, -1)
    logits = every.gather(2, of_token[:, :, None])[:, :, 0]  # (G, H, N)
    peak = own.scatter_reduce(2, of_token, logits.masked_fill(~real[:, None], -torch.inf), "amax")
    shares = torch.where(real[:, None], (logits - peak.gather(2, of_token)).exp(), 0)
    total = shares @ members(part, real, own.shape[2]).mT.to(shares.dtype) + (own - peak).exp()  # (G, H, P)
    return (shares / total.gather(2, of_token)).mean(1)


def flow_score(attention: Tensor, semantic: Tensor | None, strength: Tensor, part: Tensor, real: Tensor, parts: int = 1) -> Tensor:
    """Step 1, `(G, N)`; without a semantic row attention times strength."""
    if semantic is None:
        return attention * strength
    member = members(part, real, parts)
    attention, semantic = (row / of_part(part_sum(row, member), part) for row in (attention, semantic))
    return (attention + semantic) * strength


def accumulate(previous: Tensor | None, score: Tensor, history: float = 0.5) -> Tensor:
    """Step 2; `history` is the weight of the old."""
    return score if previous is None else history * previous + (1 - history) * score


def last_row(last: Tensor, others: Tensor, real: Tensor, scaling: float | None = None) -> Tensor:
    """Softmax of `last (G, H, d)` against `others (G, N, H', d)` (H' divides H) over the real ones; mean over heads, `(G, N)`.

    `scaling` is the factor on the logits, that of the model's attention; None = `d ** -0.5`.
    """
    spread = widened(others)[:, :, :, None]  # (G, N, H', 1, d)
    grouped = widened(last).unflatten(1, (others.shape[2], -1))[:, None]  # (G, 1, H', H / H', d)
    logits = (spread * grouped).sum(-1).flatten(2) * (last.shape[-1] ** -0.5 if scaling is None else scaling)  # (G, N, H)
    return logits.masked_fill(~real[..., None], -torch.inf).softmax(1).mean(2)


def view_targets(keep: Tensor, available: Tensor, final: bool) -> Tensor:
    """Patches each view has when the tower is done: `(G, P)` int64 from `keep (G,)` and `available (G, P)` patches.

    `final` shares `keep` out by size. Otherwise an image of several views gets `keep // 2` for each (more where that would be below `keep`
    together), because an LLM layer does the rest.
    """
    if available.shape[1] == 1:
        return available.minimum(keep[:, None])
    if final:
        return quota(available.double(), available, keep)
    several = (available > 0).sum(1) > 1
    each = torch.where(several, keep // 2, keep).clamp_min(1)
    total = available.minimum(each[:, None]).sum(1).maximum(available.sum(1).minimum(keep))
    return quota((available > 0).double(), available, total)


@register_method("flowcut")
@dataclass(frozen=True, kw_only=True)
class FlowCut(Method):
    """Pruning by information flow; the default budget is the paper's 128 of 576 (and 640 of 2880)."""

    llm_layer: int | None = 2
    history: float = 0.5
    interval: int = 2
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("tower", "prefill")
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=2 / 9)
    published_positions: ClassVar[PositionOption] = "renumber"
    card: ClassVar[Card] = Card(
        title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
        paper="Tong et al.: FlowCut",
        venue="NeurIPS 2025",
        arxiv="2505.19536",
        code="github.com/TungChintao/FlowCut",
        signals="CLS attention row and values of every tower layer; for AnyRes and grids of their own the last prompt token's attention and "
        "values in the LLM",
        cost="two rows of N per tower layer, a sort of N every second layer",
        settings={
            "llm_layer": "images of several views or of a grid of their own: LLM layer from whose input on exactly `keep` are left; None: the tower "
            "prunes down to `keep` itself",
            "history": "weight of the scores of earlier layers against the score of this one, in [0, 1)",
            "interval": "tower layers from one pruning to the next; the last always prunes",
            "compat": "'authors': all images of a batch share one prune count per layer; refused for AnyRes",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.llm_layer is not None and self.llm_layer < 1:
            raise ValueError(f"flowcut: llm_layer must be at least 1 or None, got {self.llm_layer}; the paper's 'after layer 1' is 2")
        if not 0 <= self.history < 1:
            raise ValueError(f"flowcut: history must be in [0, 1), got {self.history}; the paper uses 0.5, 0 forgets earlier layers")
        if self.interval < 1:
            raise ValueError(f"flowcut: interval must be an integer from 1 on, got {self.interval!r}; the paper prunes every second layer")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        feature, anyres, own_grid = geometry.feature_layer, geometry.anyres, geometry.patch_grid is None
        if feature < 1:
            raise VtrError(f"flowcut: needs a tower layer in front of feature layer {feature} of {geometry.host!r}; use a boundary method")
        if self.compat == "authors" and anyres:
            raise VtrError(
                f"flowcut: compat='authors' spends budget on the padding of AnyRes images, which host {geometry.host!r} never offers; "
                "leave compat out"
            )
        in_llm = (anyres or own_grid) and self.llm_layer is not None
        if in_llm and anyres and self.average_keep is not None:
            raise VtrError(
                f"flowcut: average_keep={self.average_keep} cannot be solved where images have several views, each leaves the tower with keep / 2; "
                "give keep or keep_ratio, or llm_layer=None to finish in the tower",
                setting="average_keep",
            )
        if in_llm and not (self.llm_layer or 0) < geometry.llm_layers:
            raise ValueError(
                f"flowcut: llm_layer={self.llm_layer} is not one of the LLM's layers 1 to {geometry.llm_layers - 1}; the paper's 'after "
                "layer 1' is llm_layer=2, None finishes in the tower"
            )
        steps: list[Step] = [Observe(Tower(1), _note_keep)]
        wider = WIDER if in_llm and own_grid else 1
        final = not in_llm or own_grid
        steps += [self._tower_step(geometry.has_cls, layer, feature - 1 - layer, final, wider) for layer in range(feature)]
        if in_llm:
            before = (self.llm_layer or 0) - 1
            needs = attention(before, queries=LAST, heads=True), values(before)
            steps.append(Remove(Layer(before + 1), lambda view: _in_llm(view, *needs), needs))
        return tuple(steps)

    def _tower_step(self, has_cls: bool, layer: int, remaining: int, final: bool, wider: int) -> Step:
        """What happens behind tower layer `layer`, that is at the input of the next; `wider` times the budget leave the tower."""
        row, value = cls_row(layer) if has_cls else pooled_row(layer), values(layer, tower=True)
        cls = (cls_values(layer),) if has_cls else ()
        select = partial(self._in_tower, row, value, cls, remaining, final, wider)
        if remaining % self.interval != 0:
            return Observe(Tower(layer + 1), select, (row, value, *cls), counted=False)
        multiple = wider if wider > 1 else None
        return Remove(Tower(layer + 1), select, (row, value, *cls), counted=remaining == 0 and final, multiple=multiple)

    def _in_tower(
        self, row: Signal, value: Signal, cls: tuple[Signal, ...], remaining: int, final: bool, wider: int, view: View
    ) -> Selection | None:
        part, paid, carried = view.cells[..., 0], view.signals[row], view.signals[value]
        parts = view.views
        semantic = semantic_row(carried, view.signals[cls[0]][:, :parts], part, view.real) if cls else None
        score = flow_score(paid, semantic, value_strength(carried), part, view.real, parts)
        view.per_token[STATE] = cumulative = accumulate(view.per_token.get(STATE), score, self.history)
        if remaining % self.interval != 0:
            return None
        available = members(part, view.real, parts).sum(-1)
        asked = view.keep if remaining == 0 and final else (wider * view.memory[KEEP]).minimum(available.sum(1))
        target = view_targets(asked, available, final)
        authors = self.compat == "authors"
        amount = prune_amount(paid, part, view.real, target, remaining, 1e-7 if authors and not cls else None)
        if authors:
            amount = amount.amax().expand_as(amount)
        return Selection(keep=flowcut(cumulative, amount, part, view.real, target))


def _note_keep(view: View) -> None:
    """Pruning steps decide their own counts, so that their `view.keep` does not say where the schedule ends; an observing step's does."""
    view.memory[KEEP] = view.keep


def _in_llm(view: View, row: Signal, value: Signal) -> Selection:
    """Step 4: the last prompt token's view on the visual tokens of one image."""
    assert view.text is not None
    heads = widened(view.signals[row])  # (G, H, N)
    relation = torch.where(view.real[:, None], heads, 0)
    relation = (relation / relation.sum(-1, keepdim=True).clamp_min(torch.finfo(relation.dtype).tiny)).mean(1)
    visual, text = view.signals[value]
    last = _last(visual, view.real)
    if text.shape[1]:
        last = torch.where(view.text.real.any(1)[:, None, None], _last(text, view.text.real), last)
    part = torch.zeros_like(view.patch)
    semantic = last_row(last, visual, view.real, view.scaling.get(value))
    score = flow_score(relation, semantic, value_strength(visual), part, view.real)
    return Selection(keep=topk_mask(score, view.real, view.keep))


def _last(values: Tensor, real: Tensor) -> Tensor:
    """The value `(G, H, d)` of the last real token of `values (G, S, H, d)`."""
    at = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).amax(1).clamp_min(0)
    return take(values, at[:, None])[:, 0]
