"""Makes Views of tokens, and files what methods note per token."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.engine.images import Images, to_device
from vtr.engine.tokens import Located
from vtr.types import View


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
        grids=[[layout.patch_grid] * layout.views for layout in layouts],
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
