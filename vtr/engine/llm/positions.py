"""Positions of the tokens of a call, and their rotary tables, when tokens are removed and positions kept or renumbered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._protocol import Host
from vtr.ops.gather import take
from vtr.plans import Plan
from vtr.types import VtrError

Rope = tuple[Tensor, Tensor]


@dataclass
class Positions:
    """Positions of the tokens that are left.

    A model passes its rotary tables to every layer, one table for all of them or one per type of layer. So what is kept here is which rows
    of such a table the tokens that are left use. Only where no row has the right position is a table made by the model's rotary module.

    Args:
        ids: `(B or 1, S)` int64, or `(3 or 4, B, S)` for M-RoPE; renumbered ones where the plan renumbers.
        gapless: whether ids of real tokens are consecutive, so that the table has a row for every renumbered position.
        past_shift: per layer None or `(B, 1)`, how far earlier turns were moved down.
        shift: the same after this call; both are None without renumbering.
        rows: `(B, S)` int64, row of each token in the tables that the model passes; None = the tables fit as they are.
        tabled: the model has made its tables for this call, so that later removals pick rows of them.
        made: no row of the model's tables has these positions.
        whole: position ids of the whole call, where the model makes other tables of what is left of it.
    """

    ids: Tensor
    gapless: bool
    past_shift: list[Tensor | None]
    shift: list[Tensor | None] = field(default_factory=list)
    rows: Tensor | None = None
    tabled: bool = False
    made: bool = False
    whole: Tensor | None = None
    _whole: dict[str, Rope] = field(default_factory=dict)
    _tables: dict[tuple, Rope] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shift = list(self.past_shift)

    def at(self, layer: int) -> Tensor:
        """Returns the position ids that layer `layer` uses."""
        moved = self.past_shift[layer]
        return self.ids if moved is None else self.ids - moved.to(self.ids.device)

    def follow_length(self, host: Host, plan: Plan, length: int) -> None:
        """Notes the positions of a whole call before anything is removed, where they decide on the frequencies (dynamic NTK, LongRoPE).

        Args:
            host, plan: the model and what is done to it.
            length: tokens up to the end of this call.

        Raises:
            VtrError: layers would have different lengths, so that no table is right for all of them.
        """
        if host.rotary_limit is None:
            return
        renumbering = [item for item in plan.steps if item.position_ids == "renumber"]
        inside = next((item.name for item in renumbering if item.step.stage == "prefill"), None)
        if inside is not None and length > host.rotary_limit:
            raise VtrError(
                f"{inside}: position_ids='renumber' inside the LLM of {host.name!r}, whose rotary frequencies depend on the length beyond "
                f"{host.rotary_limit} tokens, got {length}; use position_ids='keep', or renumber at the boundary alone"
            )
        if not renumbering:  # renumbered at the boundary, what is left is a shorter prompt
            self.tabled, self.whole = True, self.at(0)

    def compact(self, index: Tensor, valid_before: Tensor, valid: Tensor, layer: int, renumber: bool) -> None:
        """Follows a removal at the input of `layer`.

        Args:
            index: `(B, S')` into the old positions; `valid_before (B, S)` and `valid (B, S')`, real tokens before and after.
            layer: 0 also stands for the boundary, whose rotary tables the model itself will make.
            renumber: survivors get consecutive positions from the first of the row on.
        """
        self._tables.clear()
        old_ids = self.ids
        self.ids = take(old_ids, index, dim=-1)
        if not renumber:
            self._pick(index)
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
        if self.gapless:
            first = valid_before.to(torch.uint8).argmax(1, keepdim=True)
            self._pick((first + rank).clamp_max(old.shape[1] - 1))
        elif self.tabled:
            self.made, self.rows = True, None
        self.gapless = True

    def _pick(self, index: Tensor) -> None:
        """Takes rows `index (B, S')` of the tables in use now."""
        if self.tabled and not self.made:
            self.rows = index if self.rows is None else self.rows.gather(1, index)

    def _share_shifts(self, layer: int) -> None:
        """Layers whose shifts were one tensor before stay one tensor, so that decoding calls the rotary module once per segment."""
        for i in range(layer + 1, len(self.shift)):
            if self.past_shift[i] is self.past_shift[i - 1]:
                self.shift[i] = self.shift[i - 1]

    def rope_for(self, layer: int, hidden: Tensor, given: Any, kind: str, rotary: Callable[[Tensor, Tensor, str], Rope]) -> Any:
        """Returns the rotary table `(cos, sin)` of a layer for the tokens that are left.

        Args:
            layer: which.
            hidden: `(B, S, D)`, for device and dtype.
            given: what the model passes to this layer; None, of a model without rotary positions, is returned as it is.
            kind: type of the layer; layers of one type share a table.
            rotary: `(hidden, position ids, kind) -> table`, by the model's own rotary module.
        """
        self.tabled = True
        shift = self.past_shift[layer]
        own = self.made or shift is not self.past_shift[0]
        if given is None or (self.rows is None and not own):
            return given
        key = (kind, hidden.device, id(shift) if own else None)
        if key not in self._tables:
            if own:
                self._tables[key] = rotary(hidden, self.at(layer).to(hidden.device), kind)
            else:
                assert self.rows is not None
                if self.whole is not None and kind not in self._whole:
                    # made behind the model's own, so that its module goes on from this length
                    self._whole[kind] = rotary(hidden, self.whole.to(hidden.device), kind)
                cos, sin = self._whole.get(kind, given)
                self._tables[key] = (
                    take(cos, self.rows.to(cos.device)).to(hidden.device),
                    take(sin, self.rows.to(sin.device)).to(hidden.device),
                )
        return self._tables[key]
