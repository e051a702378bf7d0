"""Positions of the tokens of a call, and their rotary tables, when tokens are removed and positions kept or renumbered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtr.ops.gather import take

Rope = tuple[Tensor, Tensor]


@dataclass
class Positions:
    """Positions of the tokens that are left.

    Args:
        ids: `(B or 1, S)` int64, or `(3 or 4, B, S)` for M-RoPE; renumbered ones where the plan renumbers.
        gapless: whether ids of real tokens are consecutive, so that the rotary table has a row for every renumbered position.
        past_shift: per layer None or `(B, 1)`, how far earlier turns were moved down.
        shift: the same after this call; both are None without renumbering.
    """

    ids: Tensor
    gapless: bool
    past_shift: list[Tensor | None]
    shift: list[Tensor | None] = field(default_factory=list)
    rope: Rope | None = None
    _rope_shift: Tensor | None = None

    def __post_init__(self) -> None:
        self.shift = list(self.past_shift)
        self._rope_shift = self.past_shift[0]

    def at(self, layer: int) -> Tensor:
        """Position ids that layer `layer` uses."""
        moved = self.past_shift[layer]
        return self.ids if moved is None else self.ids - moved.to(self.ids.device)

    def compact(self, index: Tensor, valid_before: Tensor, valid: Tensor, layer: int, renumber: bool) -> None:
        """Follows a removal at the input of `layer`.

        Args:
            index: `(B, S')` into the old positions; `valid_before (B, S)` and `valid (B, S')`, real tokens before and after.
            layer: 0 also stands for the boundary, whose rotary table the model itself will make.
            renumber: survivors get consecutive positions from the first of the row on.
        """
        old_ids, old_rope = self.ids, self.rope
        self.ids = take(old_ids, index, dim=-1)
        if not renumber:
            self.rope = None if old_rope is None else (take(old_rope[0], index), take(old_rope[1], index))
            self.gapless = False
            return
        old = old_ids.expand(len(index), -1)
        big = torch.iinfo(old.dtype).max
        base = torch.where(valid_before, old, big).amin(1, keepdim=True)
        base = torch.where(valid_before.any(1, keepdim=True), base, 0)
        rank = (valid.cumsum(1) - 1).clamp_min(0)
        self.ids = base + rank
        saved = torch.where(valid_before, old, 0).amax(1, keepdim=True) - torch.where(valid, self.ids, 0).amax(1, keepdim=True)
        for i in range(layer, len(self.shift)):
            before = self.shift[i]
            self.shift[i] = saved if before is None else before.to(saved.device) + saved
        self._share_shifts(layer)
        if old_rope is None:
            return
        if self.gapless:
            first = valid_before.to(torch.uint8).argmax(1, keepdim=True)
            rows = (first + rank).clamp_max(old.shape[1] - 1)
            self.rope = (take(old_rope[0], rows), take(old_rope[1], rows))
        else:
            self.rope = None
            self._rope_shift = _UNKNOWN
        self.gapless = True

    def _share_shifts(self, layer: int) -> None:
        """Layers whose shifts were one tensor before stay one tensor, so that decoding calls the rotary module once per segment."""
        for i in range(layer + 1, len(self.shift)):
            if self.past_shift[i] is self.past_shift[i - 1]:
                self.shift[i] = self.shift[i - 1]

    def rope_for(self, layer: int, hidden: Tensor, given: Rope, rotary: Callable[..., Rope]) -> Rope:
        """The rotary table of a layer: the given one where nothing moved, else a compacted or newly made one.

        Args:
            layer: which.
            hidden: `(B, S, D)`, for device and dtype.
            given: what the model passes to every layer.
            rotary: the model's own rotary module.
        """
        shift = self.past_shift[layer]
        if shift is not self._rope_shift:
            self.rope = rotary(hidden, position_ids=self.at(layer).to(hidden.device))
            self._rope_shift = shift
        rope = given if self.rope is None else self.rope
        if rope[0].device != hidden.device:
            rope = (rope[0].to(hidden.device), rope[1].to(hidden.device))
        return rope


_UNKNOWN = torch.zeros(0)
