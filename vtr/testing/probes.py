"""Small deterministic methods on the public contract, one per mechanism; each notes what it chose for the tests to check against.

None is registered: a plan takes instances. What a probe chose is found in `recorded()`, in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtr import types
from vtr.types import Boundary, Budget, Card, Geometry, Layer, Merge, Method, Place, Remove, Selection, Signal, Step, Tower, View
from vtr.types.signals import cls_row, pooled_row


@dataclass
class Choice:
    """What one step did: per group the patch ids it left, and what each removed patch was merged into."""

    stage: str
    layer: int
    retained: list[list[int]]
    merged: list[dict[int, int]]
    seen: list[list[int]]
    kind: str = "image"


_recordings: list[list[Choice]] = []


@contextmanager
def recorded() -> Iterator[list[Choice]]:
    """The choices of all probes inside the block."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def _note(stage: str, view: View, keep: Tensor, assign: Tensor | None = None) -> Selection:
    for recording in _recordings:
        retained, merged, seen = [], [], []
        for group in range(len(keep)):
            patch = view.patch[group].tolist()
            retained.append([patch[i] for i in keep[group].nonzero()[:, 0].tolist()])
            seen.append([patch[i] for i in view.real[group].nonzero()[:, 0].tolist()])
            targets = [] if assign is None else assign[group].tolist()
            merged.append({patch[i]: patch[t] for i, t in enumerate(targets) if t >= 0})
        recording.append(Choice(stage, view.layer, retained, merged, seen, view.kinds[0]))
    return Selection(keep=keep)


def rank_of(real: Tensor) -> Tensor:
    """`(G, N)` rank of each real token in its group."""
    return real.long().cumsum(1) - 1


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Base of the probes: `select` runs at one place."""

    stage: Literal["tower", "boundary", "prefill"] = "boundary"
    layer: int = 0

    name: ClassVar[str] = "probe"
    card: ClassVar[Card] = Card(title="Probe", paper="none: a test")
    stages: ClassVar[tuple[Any, ...]] = ("tower", "boundary", "prefill")
    needs: ClassVar[tuple[Signal, ...]] = ()

    @property
    def where(self) -> Place:
        return {"tower": Tower(self.layer), "boundary": Boundary(), "prefill": Layer(self.layer)}[self.stage]

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Remove(self.where, self.select, self.needs, counted=self.default_budget is not None),)

    def select(self, view: View) -> Selection:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class EveryNth(Probe):
    """Every `stride`-th visual token of an image, from the `offset`-th on."""

    stride: int = 2
    offset: int = 0

    def select(self, view: View) -> Selection:
        return _note(self.stage, view, view.real & (rank_of(view.real) % self.stride == self.offset))


@dataclass(frozen=True, kw_only=True)
class Ragged(Probe):
    """Every second or every fifth token, by the content of the image: images keep different numbers."""

    def select(self, view: View) -> Selection:
        stride = torch.where(view.checksum % 2 == 0, 2, 5)[:, None]
        return _note(self.stage, view, view.real & (rank_of(view.real) % stride == 0))


@dataclass(frozen=True, kw_only=True)
class KeepAll(Probe):
    """Keeps everything, by a budget that nothing exceeds."""

    def select(self, view: View) -> Selection:
        return _note(self.stage, view, view.real.clone())


@dataclass(frozen=True, kw_only=True)
class DropAll(Probe):
    """Removes every visual token."""

    def select(self, view: View) -> Selection:
        return _note(self.stage, view, torch.zeros_like(view.real))


@dataclass(frozen=True, kw_only=True)
class ByAttention(Probe):
    """The tokens that the last text token attends to most, as FastV does."""

    stage: Literal["tower", "boundary", "prefill"] = "prefill"
    layer: int = 2
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.2)
    needs: ClassVar[tuple[Signal, ...]] = (Signal("rows"),)

    def select(self, view: View) -> Selection:
        score = view.signals[self.needs[0]].masked_fill(~view.real, -1.0)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        return _note(self.stage, view, view.real & (rank < view.keep[:, None]))


@dataclass(frozen=True, kw_only=True)
class TowerTop(Probe):
    """Inside the tower: the patches that the CLS token (or all queries, where there is none) attends to most."""

    stage: Literal["tower", "boundary", "prefill"] = "tower"
    layer: int = 2
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.34)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        signal = cls_row() if geometry.has_cls else pooled_row()
        return (Remove(Tower(self.layer), partial(self.top, signal), (signal,)),)

    def top(self, signal: Signal, view: View) -> Selection:
        score = view.signals[signal].masked_fill(~view.real, -1.0)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        return _note("tower", view, view.real & (rank < view.keep[:, None]))


def merge_pairs(view: View, offset: int = 0, inside: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Every second token takes in the one after it, or with `inside` the one after it of its view: keep mask, new values and assignment."""
    rank = rank_of(view.real)
    pivot = view.real & ((rank % 2 == 0) | (rank < offset))
    if inside:
        pivot |= view.real & (view.cells[..., 0].diff(dim=1, prepend=view.cells[:, :1, 0]) != 0)
    place = torch.arange(view.real.shape[1], device=view.real.device).expand_as(rank)
    into = torch.where(pivot, place, -1).cummax(1).values
    assign = torch.where(view.real, into, -1)
    index = into.clamp(min=0)
    weight = view.sizes.to(view.tokens.dtype) * view.real
    total = torch.zeros_like(view.tokens).scatter_add(
        1, index[..., None].expand_as(view.tokens), torch.where(view.real[..., None], view.tokens * weight[..., None], 0.0)
    )
    count = torch.zeros_like(weight).scatter_add(1, index, weight)
    return pivot, total / count.clamp(min=1)[..., None], assign


@dataclass(frozen=True, kw_only=True)
class MergePairs(Probe):
    """Averages neighbours; in the tower between attention and MLP."""

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Merge(Tower(self.layer, at="mlp") if self.stage == "tower" else self.where, self.select, counted=False),)

    def select(self, view: View) -> Selection:
        pivot, values, assign = merge_pairs(view, inside=self.stage == "tower")
        selection = _note(self.stage, view, pivot, assign)
        return Selection(keep=selection.keep, tokens=values, assign=assign)


@dataclass(frozen=True, kw_only=True)
class Freeze(Probe):
    """Visual tokens keep their value in some LLM layers."""

    layers: tuple[int, ...] = (1, 3)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return tuple(types.Freeze(Layer(layer)) for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Observe(Probe):
    """Removes nothing; hands what it sees to `OBSERVED`."""

    signals: tuple[Signal, ...] = ()

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (types.Observe(self.where, OBSERVED.append, self.signals),)


OBSERVED: list[View] = []
"""Views that `Observe` has seen; a test clears it first."""


@dataclass(frozen=True, kw_only=True)
class Carried(Probe):
    """Scores found in the tower decide at the boundary; patch ids noted there must still belong to the same tokens in the LLM."""

    layer: int = 2

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        signal = cls_row() if geometry.has_cls else pooled_row()
        return (
            types.Observe(Tower(self.layer), partial(self.note, signal), (signal,)),
            Remove(Boundary(), self.best_half, counted=False),
            Remove(Layer(3), self.compare, counted=False),
        )

    def note(self, signal: Signal, view: View) -> None:
        view.per_token["score"] = view.signals[signal]
        view.per_token["patch"] = view.patch
        view.memory["layer"] = view.layer

    def best_half(self, view: View) -> Selection:
        assert view.memory["layer"] == self.layer
        self.same_patches(view)
        score = view.per_token["score"].masked_fill(~view.real, -torch.inf)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        half = (view.real.sum(1, keepdim=True) + 1) // 2
        return _note("boundary", view, view.real & (rank < half))

    def compare(self, view: View) -> Selection:
        self.same_patches(view)
        return _note("prefill", view, view.real & (rank_of(view.real) % 3 == 0))

    @staticmethod
    def same_patches(view: View) -> None:
        assert torch.equal(view.per_token["patch"][view.real], view.patch[view.real]), "per_token rows belong to other tokens"
