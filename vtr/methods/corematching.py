"""CoreMatching: keep the visual tokens that share the most neurons with the whole prompt.

Paper: Wang et al., ICML 2025, arXiv 2505.19235 (read through two summaries).
Code:  github.com/wangqinsi1/2025-ICML-CoreMatching at 046b24e, Apache-2.0: nothing copied, checked against its outputs.
Stage: prefill. Reads: what enters the MLP's last projection, one layer. Batch: any. Deterministic: yes.

1. A neuron is active for a token where its gated activation is above 0. The token's core neurons are the top rho of its active ones.
2. The core neurons of the prompt are the top beta of all neurons by the number of tokens, text and visual, whose core they are in.
3. A visual token counts how many core neurons of the prompt are active for it.
4. Tokens with at least tau such neurons stay, where tau is the elbow of the counts in descending order: the point farthest from the line between
   its ends. With a budget, the tokens with the most.
5. The others are gone from the input of one early layer on.

Paper to code: Gamma -> active, rho -> rho, beta -> beta, tau -> the elbow's value, l -> layer.
Departures: this is the paper's definition with tokens really removed. The released code does something else (each of 14 layers overwrites its own KV
cache with zeros by the neurons shared with one text token, which saves nothing): `scripts/replay/corematching.py` has it, a model refuses it. The
neuron half of the paper (decoding with core neurons only) is in neither. Its published speed could come from neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtr.ops.elbow import elbow
from vtr.ops.outliers import quantile
from vtr.ops.topk import topk_mask
from vtr.registry import register_method
from vtr.types import Card, Geometry, Layer, Method, Remove, Selection, Signal, Stage, Step, View, VtrError, at_least, check_llm_layer
from vtr.types.signals import mlp_activation

CHUNK = 1 << 22
"""Activations sorted at a time."""


def core_bound(activation: Tensor, rho: float = 0.2) -> Tensor:
    """The (1 - rho)-quantile (linear) of the positive values of each row of `activation (R, I)`: `(R,)` float64, inf where there is none."""
    count = (activation > 0).sum(1)
    place = (1 - rho) * (count - 1).clamp_min(0).double()  # counted from the smallest positive value
    most = min(ceil(rho * (activation.shape[1] - 1)) + 2, activation.shape[1])
    top = activation.topk(most, dim=1).values.double()  # all that can lie at or above the quantile, largest first
    below = place.floor().long()
    low = top.gather(1, (count - 1 - below).clamp(0, most - 1)[:, None])[:, 0]
    high = top.gather(1, (count - 2 - below).clamp(0, most - 1)[:, None])[:, 0]
    return torch.where(count > 0, low + (high - low) * (place - below), torch.inf)


def core_votes(activation: Tensor, real: Tensor, rho: float = 0.2) -> Tensor:
    """Step 1: for how many real tokens of each row a neuron is a core neuron, `(G, I)` float64.

    `activation (G, S, I)`, `real (G, S)` bool. A token's core neurons are those at or above the (1 - rho)-quantile (linear) of its positive ones.
    """
    votes = activation.new_zeros(len(activation), activation.shape[2], dtype=torch.float64)
    size = max(1, CHUNK // max(1, len(activation) * activation.shape[2]))
    for part, there in zip(activation.split(size, 1), real.split(size, 1), strict=True):
        bound = core_bound(part.flatten(0, 1), rho).view(part.shape[:2])
        votes += ((part > 0) & (part >= bound[..., None]) & there[..., None]).sum(1)
    return votes


def core_neurons(votes: Tensor, beta: float = 0.4) -> Tensor:
    """Step 2: `(G, I)` bool, neurons with votes `(G, I)` at or above their (1 - beta)-quantile (linear)."""
    return votes >= quantile(votes, torch.ones_like(votes, dtype=torch.bool), 1 - beta)[:, None]


def shared_neurons(activation: Tensor, core: Tensor) -> Tensor:
    """Step 3: `(G, N)` float64, how many of the neurons `core (G, I)` are active in `activation (G, N, I)`."""
    return ((activation > 0) & core[:, None]).sum(2).double()


@register_method("corematching")
@dataclass(frozen=True, kw_only=True)
class CoreMatching(Method):
    """Core tokens of the paper, removed for good. Without a budget the elbow of each image decides how many stay."""

    layer: int = 2
    rho: float = 0.2
    beta: float = 0.4
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("prefill",)
    takes_budget: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        title="CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning",
        paper="Wang et al., 2025",
        venue="ICML 2025",
        arxiv="2505.19235",
        code="github.com/wangqinsi1/2025-ICML-CoreMatching (Apache-2.0, not used)",
        signals="MLP activations of layer - 1",
        cost="partly sorts the MLP activations of one layer, O(S I log I); layers before `layer` run in full",
        settings={
            "layer": "visual tokens are gone from the input of this layer on; activations are those of the layer before",
            "rho": "share of a token's active neurons that are its core",
            "beta": "share of all neurons that are the core of the prompt",
            "compat": "authors: refused, the released code zeroes cached keys and values of tokens that stay; the pure functions have it",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "layer", 1, "; activations come from the layer before")
        for name in ("rho", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"corematching: {name} must be in (0, 1], got {getattr(self, name)}; the paper uses 0.2 and 0.4")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat == "authors":
            raise VtrError("corematching: compat='authors' zeroes cached keys and values instead of removing tokens; use compat=None")
        check_llm_layer(self.name, self.layer, geometry, least=1)
        activation = mlp_activation(self.layer - 1)
        exact = self.budget is not None
        return (Remove(Layer(self.layer), partial(self._select, activation, exact), (activation,), counted=exact),)

    def _select(self, signal: Signal, exact: bool, view: View) -> Selection:
        assert view.text is not None
        activation = view.signals[signal]
        same = (view.row[:, None] == view.row).double()  # images of one prompt vote together
        votes = same @ core_votes(activation.visual, view.real, self.rho) + core_votes(activation.text, view.text.real, self.rho)
        shared = shared_neurons(activation.visual, core_neurons(votes, self.beta))
        if exact:
            return Selection(keep=topk_mask(shared, view.real, view.keep))
        return Selection(keep=view.real & (shared >= elbow(shared, view.real).value[:, None]))
