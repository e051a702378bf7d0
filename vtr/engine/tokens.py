"""Which original token stands at which position, for the tower and the LLM; the same code serves the tower and the LLM.

In the tower a row is one view and its columns are patches; in the LLM a row is a prompt and its columns are positions. Every visual token
has a global id `gid = image * slots + patch`, the same in both, so that what one stage learns another can look up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtr.ops.gather import compaction


@dataclass
class Sequence:
    """Rows of tokens that shrink.

    Args:
        column: `(R, S)` int64, original column of the token at each position.
        valid: `(R, S)` bool, False for padding and filler.
        gid_of: `(R, S0)` int64, global id of every original column, -1 where there is no visual token.
    """

    column: Tensor
    valid: Tensor
    gid_of: Tensor

    def gid(self) -> Tensor:
        """Global id at each position `(R, S)`, -1 for anything but a visual token that is really there."""
        return torch.where(self.valid, self.gid_of.gather(1, self.column), -1)

    def inverse(self) -> Tensor:
        """Position of every original column `(R, S0)`; undefined for columns that are gone."""
        position = torch.arange(self.column.shape[1], device=self.column.device).expand_as(self.column)
        return torch.zeros_like(self.gid_of).scatter_(1, self.column, position)

    def compact(self, keep: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
        """Shortens the rows to a keep mask `(R, S)`; returns `compaction`'s index and real mask."""
        index, real = compaction(keep, width)
        self.column = self.column.gather(1, index)
        self.valid = self.valid.gather(1, index) & real
        return index, real

    def snapshot(self) -> Sequence:
        """A copy that later removals do not touch."""
        return Sequence(self.column, self.valid, self.gid_of)


@dataclass
class Located:
    """Where the tokens of a View are: `flat (G, N)` into the flattened sequence, `present (G, N)`, `gid (G, N)`."""

    flat: Tensor
    present: Tensor
    gid: Tensor


def locate(sequence: Sequence, groups: int, stride: int, width: int) -> Located:
    """Finds the tokens of each group (global ids `[g * stride, (g + 1) * stride)`) in position order."""
    rows, length = sequence.column.shape
    size = rows * length
    gid = sequence.gid().flatten()
    table = torch.full((groups * stride + 1,), size, dtype=torch.int64, device=gid.device)
    table.scatter_(0, torch.where(gid >= 0, gid, groups * stride), torch.arange(size, device=gid.device))
    flat = table[:-1].view(groups, stride).sort(dim=1).values[:, :width]
    present = flat < size
    flat = flat.clamp_max(size - 1)
    return Located(flat, present, torch.where(present, gid[flat], 0))
