"""Views of tower features made by hand, one row per view; and what a real tower computes, by its own modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.tiny_models import Batch
from tests.views import view_of
from vtr.types import Signal, Step, View

HEADS, WIDTH = 4, 5
"""Attention heads and their width."""


@dataclass
class Layer:
    """One layer of one view, CLS first where there is one: `query`, `key` and `output (1 + N, C)`."""

    query: Tensor
    key: Tensor
    output: Tensor
    cls: int = 1
    heads: int = HEADS

    def signal(self, signal: Signal) -> Tensor:
        """What the engine would hand out: `(N)`, `(H, N)` or `(N, H, d)`."""
        if signal.kind in ("q", "k"):
            return (self.query if signal.kind == "q" else self.key)[self.cls :].unflatten(-1, (self.heads, -1))
        if signal.kind == "received":
            maps = torch.stack([self.head_logits(i).softmax(-1) for i in range(len(self.query))])[..., self.cls :]
            return maps.mean(0) if signal.heads else maps.mean((0, 1))
        assert signal.kind == "cls_row" and self.cls
        logits = self.head_logits(0)
        rows = (logits.softmax(-1) if signal.softmax else logits)[:, 1:]
        return rows if signal.heads else rows.mean(0)

    def head_logits(self, row: int) -> Tensor:
        """`(H, 1 + N)` scaled logits of one query."""
        query, key = self.query[row].view(self.heads, -1), self.key.unflatten(-1, (self.heads, -1))
        return torch.einsum("hd,nhd->hn", query, key) * query.shape[1] ** -0.5

    def one_head(self) -> Tensor:
        """`(N,)`: CLS attention as one head of the full width."""
        return (self.key @ self.query[0] * self.key.shape[1] ** -0.5).softmax(0)[1:]

    def received(self) -> Tensor:
        """`(N,)`: attention each token gets, mean over heads and queries."""
        return torch.stack([self.head_logits(i).softmax(-1) for i in range(len(self.query))]).mean((0, 1))


def random_layer(n: int, seed: int = 0, cls: int = 1) -> Layer:
    """A layer of a view of `n` patches; the same size and seed give the same layer."""
    random = torch.Generator().manual_seed(1000 * seed + n)
    return Layer(*(torch.randn(cls + n, HEADS * WIDTH, generator=random) for _ in range(3)), cls)


def tower_view(
    step: Step,
    layers: Sequence[Layer | dict[int, Layer]],
    keep: int | Sequence[int],
    cells: Sequence[Tensor] | None = None,
    pad: int = 0,
    **more: Any,
) -> View:
    """The View of a step in front of the projector, with the signals it needs.

    Args:
        step: asks for signals.
        layers: of each row, or tower layer -> layer where a step reads several; tokens are the output of the last.
        keep: for all rows, or one each; limited to what a row has.
        cells: `(n, 3)` of each row; default one line of patches in view 0.
        pad: filler behind the longest row.
        **more: as for `tests.views.view_of`.
    """
    every = [layer if isinstance(layer, dict) else dict.fromkeys((s.layer or 0 for s in step.needs), layer) for layer in layers]
    last = [layer[max(layer)] for layer in every]
    counts = [len(layer.output) - layer.cls for layer in last]
    cells = cells or [torch.cartesian_prod(torch.tensor([0]), torch.tensor([0]), torch.arange(n)).view(-1, 3) for n in counts]
    wanted = [min(k, n) for k, n in zip([keep] * len(counts) if isinstance(keep, int) else keep, counts, strict=True)]
    tokens = _padded([layer.output[layer.cls :] for layer in last], 0, pad)
    view = view_of(cells, wanted, more.pop("patch_grid", (6, 6)), tokens=tokens, pad=pad, **more)
    view.signals = {
        need: _padded([layer[need.layer or 0].signal(need) for layer in every], 1 if need.heads else 0, pad) for need in step.needs
    }
    return view


def _padded(rows: list[Tensor], dim: int, pad: int) -> Tensor:
    """Rows of different length along `dim` in one tensor, filled with a value that must not matter."""
    most = max(row.shape[dim] for row in rows) + pad
    filled = []
    for row in rows:
        shape = list(row.shape)
        shape[dim] = most - row.shape[dim]
        filled.append(torch.cat([row, row.new_full(shape, 9.0)], dim))
    return torch.stack(filled)


@torch.no_grad()
def layers_of(model: Any, batch: Batch) -> list[list[Layer]]:
    """Every layer of every view of a batch, by the tower's own modules: `[layer][view]`. Views that are only padding are left out."""
    tower, pixels = model.model.vision_tower, batch.inputs["pixel_values"]
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)[pixels.flatten(0, 1).abs().flatten(1).sum(1) > 0]
    encoder = tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder
    states = tower(pixels, output_hidden_states=True).hidden_states
    cls, heads = states[0].shape[1] - 36, tower.config.num_attention_heads
    found = []
    for layer, entering, leaving in zip(encoder.layers, states, states[1:]):
        normed = layer.layer_norm1(entering)
        both = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
        found.append([Layer(q, k, out, cls, heads) for q, k, out in zip(*both, leaving, strict=True)])
    return found


@torch.no_grad()
def projected(model: Any, reduction: Any, batch: Batch) -> Tensor:
    """What the projector's first linear map gets in a reduced forward: `(views, S, C)`."""
    seen: list[Tensor] = []
    handle = model.model.multi_modal_projector.linear_1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with reduction:
            model(**batch.inputs)
    finally:
        handle.remove()
    return seen[0]
