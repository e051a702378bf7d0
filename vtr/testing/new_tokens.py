"""Oracles of what happens while an answer is made: new tokens that attend to chosen keys (O16), and keys of earlier layers that go (O17)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import vtr
from vtr.testing.compare import NEW, Setup, expected_of, logits_of
from vtr.testing.probes import EveryNth, Probe, Ragged, recorded
from vtr.testing.reference import largest, masked_logits, spots
from vtr.testing.tiny_models import generate
from vtr.types import Attend, Decode, Geometry, Selection, Step, View
from vtr.types.signals import attention


@dataclass(frozen=True, kw_only=True)
class ChosenKeys(Probe):
    """A new token attends to the half of the visual tokens that it pays most to one layer before, every third one to all.

    `seen` gets `(prompt row, patch ids left out)` for every new token and image.
    """

    layer: int = 2
    seen: list = field(default_factory=list, compare=False)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Attend(Decode(self.layer), self.select, (attention(self.layer - 1),)),)

    def select(self, view: View) -> Selection:
        paid = view.signals[attention(self.layer - 1)].masked_fill(~view.real, -1)
        rank = paid.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        before = view.memory.get("tokens", torch.zeros(len(paid), dtype=torch.int64))
        keep = view.real & ((rank < view.real.sum(1, keepdim=True) // 2) | (before % 3 == 2)[:, None])
        view.memory["tokens"] = before + 1
        self.seen.append(
            [(int(row), patch[gone].tolist()) for row, patch, gone in zip(view.row, view.patch, view.real & ~keep, strict=True)]
        )
        return Selection(keep=keep)


@dataclass(frozen=True, kw_only=True)
class Evict(Ragged):
    """Takes what it removes from the cache of the layers in front, too."""

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return tuple(replace(step, earlier_keys=True) for step in super().steps(geometry))  # type: ignore[call-arg]


@torch.no_grad()
def attend(setup: Setup, before: Sequence[vtr.Method] = (EveryNth(stride=2),)) -> float:
    """O16: new tokens that choose keys == the full model with the other keys hidden from them, from that layer on."""
    model, batch, chosen = setup.model, setup.batch(), ChosenKeys()
    with recorded() as choices, vtr.reduced(model, [*before, chosen]) as reduction:
        answer = generate(model, batch, NEW)
    where = spots(batch)
    counts = [[len(spot.patches) - len(gone) for spot, (_, gone) in zip(where, step, strict=True)] for step in chosen.seen]
    if not before:
        assert reduction.report().attended == counts, "report: attended"
    hidden = torch.zeros(len(batch.valid), NEW - 1, batch.valid.shape[1], dtype=torch.bool)
    for step, images in enumerate(chosen.seen):
        for spot, (row, gone) in zip(where, images, strict=True):
            assert row == spot.row
            hidden[row, step, spot.positions[torch.isin(spot.patches, torch.tensor(gone, dtype=torch.long))]] = True
    return _against(setup, batch, answer, choices, hidden, first=chosen.layer)


@torch.no_grad()
def evict(setup: Setup, before: Sequence[vtr.Method] = (EveryNth(stride=2), EveryNth(stage="prefill", layer=1))) -> float:
    """O17: keys of earlier layers gone == the full model with them hidden from new tokens; every layer then holds equally many."""
    model, batch = setup.model, setup.batch()
    with recorded() as choices, vtr.reduced(model, [*before, Evict(stage="prefill", layer=3)]):
        answer = generate(model, batch, NEW)
    cache = answer.cache if "cache" in answer else answer.past_key_values
    assert len({layer.keys.shape[2] for layer in cache.layers}) == 1, "layers hold different numbers of keys"
    gone = batch.valid & ~expected_of(batch, choices).drops[-1][1]
    return _against(setup, batch, answer, choices, gone[:, None].expand(-1, NEW - 1, -1), first=0)


def _against(setup: Setup, batch: Any, answer: Any, choices: Any, hidden: Tensor, first: int) -> float:
    """Compares the logits of an answer with those of the masked model, in which new token `i` does not see `hidden[:, i]`."""
    whole = batch.followed_by(answer.sequences[:, -NEW:-1])
    expected, length = expected_of(whole, choices), whole.valid.shape[1]
    unseen = torch.zeros(len(whole.valid), length, length, dtype=torch.bool)
    unseen[:, length - NEW + 1 :, : length - NEW + 1] = hidden
    expected.unseen, expected.unseen_from = unseen, first
    return largest(logits_of(answer).transpose(0, 1), masked_logits(setup.model, whole, expected)[:, -NEW:])


NEW_TOKENS: dict[str, Callable[[Setup], float]] = {"O16": attend, "O17": evict}
