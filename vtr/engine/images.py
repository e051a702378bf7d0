"""The visuals of one call: their layouts, prompt rows and per-token tables over global ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._layout import Grid, Kind, Layout, by_patch


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A small host list or CPU tensor on `device`, without waiting for it."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass
class Images:
    """The images of one call: what is known on the host, and tables over global ids on the device.

    Args:
        layouts: one per image or video.
        row: prompt row of each image (all 0 in the tower, which does not know).
        number: index of the image inside its row.
        source: index of the image among those the tower encoded (beams repeat it).
        slots: global ids per image, those of the image that has most.
        alive: `(images * slots,)` bool, patches that reach the LLM (survive unpadding); whole: all of them do, known on the host.
        sizes: `(images * slots,)` float32, original tokens that a token stands for.
        assign: `(images * slots,)` int64, global id an original token was merged into, -1 pruned; None before any merge.
        tables: per-token memory of methods, keyed `(method number, name)`.
        memory: per-call memory of methods, keyed by method number and kind of visual, since a method sees one kind at a time.
        checksum: `(images,)` int64 of pixel values, None where they were not seen.
        grid: `(rows, cols)` of every view, None where views differ.
    """

    layouts: list[Layout]
    row: list[int]
    number: list[int]
    source: list[int]
    slots: int
    alive: Tensor
    sizes: Tensor
    assign: Tensor | None = None
    tables: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    memory: dict[tuple[int, Kind], dict[str, Any]] = field(default_factory=dict)
    checksum: Tensor | None = None
    whole: bool = False
    grid: Grid | None = None
    _cells: Tensor | None = None

    @classmethod
    def of(cls, layouts: list[Layout], device: torch.device) -> Images:
        """Fresh tables for images that nothing has been removed from."""
        slots, count = max(layout.slots for layout in layouts), len(layouts)
        alive = by_patch(layouts, [layout.patch >= 0 for layout in layouts], slots, False).to(device, non_blocking=True)
        numbers, grids = list(range(count)), {grid for layout in layouts for grid in layout.grids}
        return cls(
            layouts,
            [0] * count,
            numbers,
            numbers,
            slots,
            alive,
            torch.ones(count * slots, device=device),
            whole=all(layout.tokens == slots for layout in layouts),
            grid=grids.pop() if len(grids) == 1 else None,
        )

    def cells(self, gid: Tensor) -> Tensor:
        """Returns view, row and column `(..., 3)` int64 of global ids."""
        patch = gid % self.slots
        if self.grid is not None:
            area = self.grid[0] * self.grid[1]
            inside = patch % area
            return torch.stack([patch // area, inside // self.grid[1], inside % self.grid[1]], -1)
        if self._cells is None:
            table = torch.zeros(len(self.layouts), self.slots, 3, dtype=torch.int64)
            for row, layout in zip(table, self.layouts, strict=True):
                row[: layout.slots] = layout.cells
            self._cells = table.flatten(0, 1).to(gid.device, non_blocking=True)
        return self._cells.to(gid.device)[gid]

    def select(self, source: list[int], row: list[int], number: list[int], device: torch.device) -> Images:
        """The same images as the LLM sees them: repeated for beams, with their prompt rows."""
        count = len(self.layouts)
        same = source == list(range(count))
        pick = to_device(source, device)

        def table(t: Tensor) -> Tensor:
            return t.to(device) if same else t.to(device).unflatten(0, (count, self.slots))[pick].flatten(0, 1)

        assign = None
        if self.assign is not None:
            shift = (torch.arange(len(source), device=device) - pick)[:, None] * self.slots
            chosen = table(self.assign).unflatten(0, (len(source), self.slots))
            assign = torch.where(chosen >= 0, chosen + shift, chosen).flatten()
        memory = {
            m: {k: v.to(device)[pick] if isinstance(v, Tensor) and v.ndim and len(v) == count else v for k, v in notes.items()}
            for m, notes in self.memory.items()
        }
        return Images(
            [self.layouts[s] for s in source],
            row,
            number,
            source,
            self.slots,
            table(self.alive),
            table(self.sizes),
            assign,
            {key: table(t) for key, t in self.tables.items()},
            memory,
            None if self.checksum is None else self.checksum.to(device)[pick],
            self.whole,
            self.grid,
        )


def joined(parts: list[Images]) -> Images:
    """Returns the images and videos of some calls as those of one, in this order."""
    if len(parts) == 1:
        return parts[0]
    slots, shift, device = max(part.slots for part in parts), 0, parts[0].alive.device

    def table(part: Images, values: Tensor | None, like: Tensor) -> Tensor:
        """A table over the ids of a part, as one over those of all; blank where it has none."""
        count = len(part.layouts)
        rows = like.new_zeros(count, part.slots, *like.shape[1:]) if values is None else values.unflatten(0, (count, part.slots))
        wide = rows.new_zeros(count, slots, *rows.shape[2:])
        wide[:, : part.slots] = rows
        return wide.flatten(0, 1)

    assign: list[Tensor] = []
    for part in parts:
        count = len(part.layouts)
        own = torch.arange(count * part.slots, device=device) if part.assign is None else part.assign
        moved = torch.where(own >= 0, (own // part.slots + shift) * slots + own % part.slots, own).view(count, part.slots)
        wide = torch.arange(count * slots, device=device).view(count, slots) + shift * slots
        wide[:, : part.slots] = moved
        assign.append(wide.flatten())
        shift += count
    names = {key: value for part in parts for key, value in part.tables.items()}
    sums = [torch.zeros(len(part.layouts), dtype=torch.int64, device=device) if part.checksum is None else part.checksum for part in parts]
    return Images(
        [layout for part in parts for layout in part.layouts],
        [row for part in parts for row in part.row],
        [number for part in parts for number in part.number],
        [source for part in parts for source in part.source],
        slots,
        torch.cat([table(part, part.alive, part.alive) for part in parts]),
        torch.cat([table(part, part.sizes, part.sizes) for part in parts]),
        None if all(part.assign is None for part in parts) else torch.cat(assign),
        {key: torch.cat([table(part, part.tables.get(key), like) for part in parts]) for key, like in names.items()},
        {key: notes for part in parts for key, notes in part.memory.items()},
        torch.cat(sums),
        all(part.whole and part.slots == slots for part in parts),
        parts[0].grid if all(part.grid == parts[0].grid for part in parts) else None,
    )


def count_views(images: Images, gid: Tensor, there: Tensor) -> list[int]:
    """Counts the tokens of every view, on the host: one sync.

    Args:
        images: whose.
        gid: `(R, S)` int64, global ids.
        there: `(R, S)` bool, which of them count.
    """
    views = max(layout.views for layout in images.layouts)
    view = images.cells(gid.clamp_min(0))[..., 0] + gid // images.slots * views
    total = len(images.layouts) * views
    counts = torch.zeros(total + 1, dtype=torch.int64, device=gid.device)
    counts.scatter_add_(0, torch.where(there, view, total).flatten(), torch.ones_like(view).flatten())
    table = counts[:-1].view(-1, views).tolist()
    return [count for row, layout in zip(table, images.layouts, strict=True) for count in row[: layout.views]]
