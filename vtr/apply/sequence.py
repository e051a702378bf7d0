"""Which original token stands at which position, and Views made from that; the same code serves the tower and the LLM.

In the tower a row is one view and its columns are patches; in the LLM a row is a prompt and its columns are positions. Every visual token
has a global id `gid = image * slots + patch`, the same in both, so that what one stage learns another can look up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._host import ImageLayout, by_patch
from vtr.ops.gather import compaction
from vtr.types import View

IGNORE = -100
"""Label that transformers' losses skip."""


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A small host list or CPU tensor on `device`, without waiting for it."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass
class Images:
    """The images of one call: what is known on the host, and tables over global ids on the device.

    Args:
        layouts: one per image.
        row: prompt row of each image (all 0 in the tower, which does not know).
        number: index of the image inside its row.
        source: index of the image among those the tower encoded (beams repeat it).
        slots: global ids per image, `most views * area`.
        alive: `(images * slots,)` bool, patches that reach the LLM (survive unpadding).
        sizes: `(images * slots,)` float32, original tokens that a token stands for.
        assign: `(images * slots,)` int64, global id an original token was merged into, -1 pruned; None before any merge.
        tables: per-token memory of methods, keyed `(method number, name)`.
        memory: per-call memory of methods, keyed by method number.
        checksum: `(images,)` int64.
    """

    layouts: list[ImageLayout]
    row: list[int]
    number: list[int]
    source: list[int]
    slots: int
    alive: Tensor
    sizes: Tensor
    assign: Tensor | None = None
    tables: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    checksum: Tensor | None = None

    @classmethod
    def of(cls, layouts: list[ImageLayout], device: torch.device) -> Images:
        """Fresh tables for images that nothing has been removed from."""
        slots = max(layout.views for layout in layouts) * layouts[0].patch_grid[0] * layouts[0].patch_grid[1]
        count = len(layouts)
        alive = by_patch(layouts, [layout.patch >= 0 for layout in layouts], slots, False).to(device, non_blocking=True)
        return cls(layouts, [0] * count, list(range(count)), list(range(count)), slots, alive, torch.ones(count * slots, device=device))

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
        )


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


def make_view(
    hidden: Tensor, located: Located, images: Images, owner: list[int], counts: list[int], keep: list[int], method: int, layer: int
) -> View:
    """The View of located tokens.

    Args:
        hidden: `(R, S, D)` of this point.
        located: where they are.
        images: tables.
        owner: image of each View row (several rows of one image when rows are views).
        counts, keep: host ints per View row.
        method: number of the method in the plan, whose memory it sees.
        layer: layer of the step.
    """
    device = hidden.device
    gid, patch = located.gid, located.gid % images.slots
    layouts = [images.layouts[i] for i in owner]
    grid = layouts[0].patch_grid
    area = grid[0] * grid[1]
    inside = patch % area
    checksum = images.checksum if images.checksum is not None else torch.zeros(len(images.layouts), dtype=torch.int64, device=device)
    return View(
        tokens=hidden.flatten(0, 1)[located.flat],
        real=located.present & images.alive[gid],
        keep=to_device(keep, device),
        counts=counts,
        keeps=keep,
        most=max(keep, default=0),
        row=to_device([images.row[i] for i in owner], device),
        cells=torch.stack([patch // area, inside // grid[1], inside % grid[1]], -1),
        patch=patch,
        patch_grid=grid,
        crop_grids=[layout.crop_grid for layout in layouts],
        image_sizes=[layout.image_size for layout in layouts],
        sizes=images.sizes[gid],
        checksum=checksum.to(device)[to_device(owner, device)],
        layer=layer,
        memory=images.memory.setdefault(method, {}),
        per_token={name: table[gid] for (number, name), table in images.tables.items() if number == method},
    )


def remember(view: View, located: Located, images: Images, method: int) -> None:
    """Files the per-token memory of a View under global ids, where later Views find it."""
    target = torch.where(located.present, located.gid, len(images.alive))
    for name, value in view.per_token.items():
        table = value.new_zeros(len(images.alive) + 1, *value.shape[2:])
        table[target.flatten()] = value.flatten(0, 1)
        images.tables[method, name] = table[:-1]


def gathered_labels(labels: Tensor, column: Tensor, valid: Tensor, fill: int = IGNORE) -> Tensor:
    """Returns labels `(B, S)` of a prompt at the tokens that are left `(B, S')`, `fill` where nothing can predict them.

    Args:
        labels: one per original column.
        column: `(B, S')` int64, original column of every token left.
        valid: `(B, S')` bool.
    """
    column, valid = column.to(labels.device), valid.to(labels.device)
    begun = valid & (valid.cumsum(1) > 1)  # nothing real predicts the first token of a row
    return torch.where(begun, labels.expand(len(column), -1).gather(1, column), fill)
