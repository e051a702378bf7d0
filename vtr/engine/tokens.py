"""Rows of tokens that become fewer: which original token stands where, and the one place where tokens are removed and merged.

In a tower or a dense ViT a row is a view (or an attention window) and its columns are patches; in the LLM a row is a prompt and its columns
are positions. Every visual token has a global id `gid = image * slots + patch`, the same in all of them, so that what one stage learns
another can look up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtr.engine.images import Images, to_device
from vtr.ops.gather import compaction, take
from vtr.types import Selection, View

Leave = Callable[[Tensor], "tuple[Tensor, int | None] | None"]
"""`keep (R, S) -> (keep, width)`: what else stays or goes around the visual tokens, and the tokens of the longest row afterwards (None asks
the device); None instead of both where nothing is to be removed."""


@dataclass
class Places:
    """Where tokens stand.

    Args:
        column: `(R, S)` int64, original column of the token at each position.
        valid: `(R, S)` bool, False for padding and filler.
        gid_of: `(R, S0)` int64, global id of every original column, -1 where there is no visual token.
        whole: every row has all its columns, in their order, and none is padding, as the host knows.
    """

    column: Tensor
    valid: Tensor
    gid_of: Tensor
    whole: bool = field(default=False, kw_only=True)

    def gid(self) -> Tensor:
        """Returns the global id at each position `(R, S)`, -1 for anything but a visual token that is really there."""
        return self.gid_of if self.whole else torch.where(self.valid, self.gid_of.gather(1, self.column), -1)

    def inverse(self) -> Tensor:
        """Returns the position of every original column `(R, S0)`; undefined for columns that are gone."""
        if self.whole:
            return self.column
        position = torch.arange(self.column.shape[1], device=self.column.device).expand_as(self.column)
        return torch.zeros_like(self.gid_of).scatter_(1, self.column, position)

    def snapshot(self) -> Places:
        """Returns a copy that later removals do not touch."""
        return Places(self.column, self.valid, self.gid_of, whole=self.whole)


@dataclass
class Groups:
    """Ranges of global ids whose tokens a method sees together: the rows of its View.

    Args:
        owner: image of every group.
        start, length: first global id of every group, and how many ids it has.
        rows: every row of the tokens is one group, in the same order.
        view: which view of its image each group is, None where groups are whole images.
        number: which of all views each group is, counted over all images; alone: a method sees them as images, not as parts of one.
    """

    owner: list[int]
    start: list[int]
    length: list[int]
    rows: bool = False
    view: list[int] | None = None
    number: list[int] = field(default_factory=list)
    alone: bool = False


@dataclass
class Spots:
    """Where the tokens of a View are.

    Args:
        flat: `(G, N)` int64 into the flattened rows.
        present: `(G, N)` bool, False for filler.
        gid: `(G, N)` int64.
        whole: the View has every token of every row, in order: `flat` counts up.
        groups: the rows of the View, where the stack asks for them again.
    """

    flat: Tensor
    present: Tensor
    gid: Tensor
    whole: bool = False
    groups: Groups | None = None


@dataclass
class Tokens(Places):
    """Rows of tokens that become fewer, and what is known of the visual ones among them.

    Args:
        images: the visuals, with tables over global ids.
        full: no row has padding or filler, known on the host.
        ordered: tokens stand in position order in every row.
        raster: a View has them in the order of their ids, since their places in the rows mean nothing (windows of a tower).
    """

    images: Images
    full: bool = False
    ordered: bool = True
    raster: bool = False

    def locate(self, groups: Groups, width: int) -> Spots:
        """Finds the tokens of each group in position order, or in that of their ids.

        Args:
            groups: whose.
            width: tokens of the largest group.
        """
        rows, length = self.column.shape
        if groups.rows and self.full and self.ordered and self.images.whole:
            flat = torch.arange(rows * length, device=self.column.device).view(rows, length)
            return Spots(flat, self.valid, self.gid_of.gather(1, self.column), whole=True)
        size, total = rows * length, len(self.images.alive)
        gid = self.gid().flatten()
        table = torch.full((total + 1,), size, dtype=torch.int64, device=gid.device)
        table.scatter_(0, torch.where(gid >= 0, gid, total), torch.arange(size, device=gid.device))
        table[total] = size
        flat = _ranges(table, groups, total)
        if self.raster:
            flat = flat.gather(1, (flat == size).to(torch.uint8).argsort(dim=1, stable=True))[:, :width]
        else:
            flat = flat.sort(dim=1).values[:, :width]
        present = flat < size
        flat = flat.clamp_max(size - 1)
        return Spots(flat, present, torch.where(present, gid[flat], 0))

    def in_place(self) -> Spots:
        """Finds the tokens of every row where they stand, filler included."""
        flat = torch.arange(self.column.numel(), device=self.column.device).view_as(self.column)
        return Spots(flat, self.valid, self.gid_of.gather(1, self.column), whole=True)

    def select(
        self, hidden: Tensor, view: View, spots: Spots, selection: Selection, chosen: Tensor, leave: Leave
    ) -> tuple[Tensor, Tensor | None]:
        """Shortens the rows to what a method answered; the only place where tokens are removed and merged.

        A merged token takes the place of its pivot; its size, and the assignment of original tokens, are kept up to date in `images`.

        Args:
            hidden: `(R, S, D)`, values of the tokens.
            view, spots: what the method saw, and where these tokens are.
            selection: its answer; chosen: `(G, N)` bool, the keep mask of it.
            leave: says what else stays or goes, and how many tokens the longest row will have.

        Returns:
            The values `(R, S', D)`, rows with fewer tokens filled on the left, and `index (R, S')` int64 of them into the old positions;
            None where no token is removed.
        """
        keep = self._kept(spots, chosen)
        goal = self._order(selection, spots)
        self._assign(selection, view, spots, chosen)
        left = leave(keep)
        if left is None:
            return self._written(hidden, None, view, spots, selection, chosen, goal), None
        index = self._compact(*left)
        return self._written(hidden, index, view, spots, selection, chosen, goal), index

    def remove(self, hidden: Tensor, keep: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
        """Shortens the rows to a keep mask `(R, S)`; returns values and index as `select` does."""
        index = self._compact(keep, width)
        return take(hidden, index), index

    def _compact(self, keep: Tensor, width: int | None) -> Tensor:
        """Lets the places follow a keep mask `(R, S)`; returns the index `(R, width)` of what is left into the old positions."""
        index, real = compaction(keep, width)
        self.column, self.valid, self.whole = self.column.gather(1, index), self.valid.gather(1, index) & real, False
        return index

    def _kept(self, spots: Spots, chosen: Tensor) -> Tensor:
        """Returns the keep mask `(R, S)`: True for chosen tokens, and for everything that the View does not have."""
        if spots.whole:
            return chosen
        size = self.column.numel()
        target = torch.where(spots.present, spots.flat, size)
        keep = torch.ones(size + 1, dtype=torch.bool, device=chosen.device)
        return keep.scatter_(0, target.flatten(), (chosen & spots.present).flatten())[:-1].view_as(self.column)

    def _order(self, selection: Selection, spots: Spots) -> Tensor | None:
        """Moves the columns of an index whose order counts; returns the flat place `(G, K)` of each of its tokens, the number of tokens
        for entries that are not real, or None without an index."""
        if selection.index is None:
            return None
        size, index = self.column.numel(), selection.index
        spot = spots.flat.gather(1, index)
        if selection.real is not None:
            spot = torch.where(selection.real, spot, size)
        if selection.order == "position":
            return spot
        places = spot.sort(dim=1).values  # the j-th token of the given order goes to the j-th place
        if selection.real is not None:
            rank = (selection.real.cumsum(1) - 1).clamp_min(0)
            places = torch.where(selection.real, places.gather(1, rank), size)
        column = self.column.flatten()
        moved = torch.cat([column, column[:1]])
        moved[places.flatten()] = torch.cat([column, column[:1]])[spot].flatten()
        self.column, self.ordered, self.whole = moved[:-1].view_as(self.column), False, False
        return places

    def _written(
        self, hidden: Tensor, index: Tensor | None, view: View, spots: Spots, selection: Selection, chosen: Tensor, goal: Tensor | None
    ) -> Tensor:
        """Returns the values of the tokens at `index (R, S')`, or of all: the given ones, and those that the method made."""
        given = selection.order == "given"
        values = selection.tokens if selection.tokens is not None or not given else take(view.tokens, selection.index)  # type: ignore[arg-type]
        if values is None:
            return hidden if index is None else take(hidden, index)
        values = values.to(hidden.dtype)
        if spots.whole and index is not None and selection.index is None:
            return take(values, index)
        if spots.whole and index is not None and selection.real is None and values.shape[1] == index.shape[1]:
            assert selection.index is not None  # one value for every place that is left
            return values if given else take(values, selection.index.argsort(dim=1))
        short = hidden if index is None else take(hidden, index)
        rows, length = short.shape[:2]
        if goal is None:
            goal = torch.where(chosen & spots.present, spots.flat, hidden.shape[0] * hidden.shape[1])
        if index is not None:  # places of the longer rows -> places of the shorter ones
            position = (
                torch.arange(length, device=index.device).expand_as(index) + torch.arange(rows, device=index.device)[:, None] * length
            )
            place = torch.full(hidden.shape[:2], rows * length, device=index.device).scatter_(1, index, position)
            goal = torch.nn.functional.pad(place.flatten(), (0, 1), value=rows * length)[goal]
        padded = torch.cat([short.flatten(0, 1), short.new_zeros(1, short.shape[-1])])
        return padded.index_copy(0, goal.flatten(), values.flatten(0, 1))[:-1].view_as(short)

    def _assign(self, selection: Selection, view: View, spots: Spots, chosen: Tensor) -> None:
        """Moves sizes, and the assignment of original tokens, to the pivots that a selection names."""
        images, real, gid = self.images, view.real, spots.gid
        if selection.assign is not None:
            assign = selection.assign
        elif images.assign is None:
            return
        else:
            assign = torch.where(chosen, torch.arange(real.shape[1], device=gid.device), -1)
        total = len(images.alive)
        source = torch.where(real, gid, total)
        pivot = torch.where(real & (assign >= 0), gid.gather(1, assign.clamp_min(0)), total)
        own = torch.arange(total + 1, device=gid.device)
        if images.assign is None:
            images.assign = torch.where(images.alive, own[:-1], -1)
        step = own.scatter(0, source.flatten(), torch.where(pivot < total, pivot, -1).flatten())
        images.assign = torch.where(images.assign >= 0, step[images.assign.clamp_min(0)], -1)
        sizes = torch.cat([images.sizes, images.sizes.new_zeros(1)])
        moved = sizes.scatter(0, source.flatten(), 0.0)
        images.sizes = moved.scatter_add(0, pivot.flatten(), torch.where(real, images.sizes[gid], 0.0).flatten())[:-1]


def _ranges(table: Tensor, groups: Groups, total: int) -> Tensor:
    """Returns the entries `(G, most ids of a group)` of a table over global ids, its last one where a group has fewer."""
    stride = max(groups.length)
    if total == stride * len(groups.start) and min(groups.length) == stride:  # the groups are all ids, one after the other
        return table[:-1].view(-1, stride)
    start, length = torch.tensor([groups.start, groups.length])[..., None]
    local = torch.arange(stride)
    index = torch.where(local < length, start + local, total)
    return table[to_device(index, table.device)]
