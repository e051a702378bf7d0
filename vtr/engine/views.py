"""Makes Views of tokens: which tokens a method sees together, how many it is to leave, and what it noted about them."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.engine.images import Images, to_device
from vtr.engine.tokens import Groups, Spots
from vtr.hosts._layout import Layout
from vtr.ops.topk import quota
from vtr.types import View


def by_image(layouts: list[Layout], slots: int) -> Groups:
    """Returns one group per image: all its views."""
    return Groups(list(range(len(layouts))), [image * slots for image in range(len(layouts))], [layout.slots for layout in layouts])


def by_view(layouts: list[Layout], slots: int, rows: bool = False) -> Groups:
    """Returns one group per view; `rows` says that the rows of the tokens are the views, in this order."""
    owner = [image for image, layout in enumerate(layouts) for _ in layout.grids]
    start = [image * slots + offset for image, layout in enumerate(layouts) for offset in layout.offsets]
    length = [area for layout in layouts for area in layout.areas]
    return Groups(owner, start, length, rows, [view for layout in layouts for view in range(layout.views)])


def quotas(target: list[int], owner: list[int], counts: list[int]) -> list[int]:
    """Shares what images are to leave among their views, by largest remainder of the tokens that these have.

    Args:
        target: tokens to leave of each image.
        owner: image of each view, ascending; counts: tokens of each view.
    """
    view = [i - owner.index(image) for i, image in enumerate(owner)]
    weights = torch.zeros(len(target), max(view) + 1, dtype=torch.int64)
    weights[owner, view] = torch.tensor(counts)
    return quota(weights.double(), weights, torch.tensor(target))[owner, view].tolist()


def make_view(
    hidden: Tensor, spots: Spots, images: Images, groups: Groups, counts: list[int], keep: list[int], method: int, layer: int
) -> View:
    """Returns the View of located tokens.

    Args:
        hidden: `(R, S, D)` of this point.
        spots: where they are.
        images: tables.
        groups: the rows of the View.
        counts, keep: host ints per View row.
        method: number of the method in the plan, whose memory it sees.
        layer: layer of the step.
    """
    device, gid, owner = hidden.device, spots.gid, groups.owner
    layouts = [images.layouts[i] for i in owner]
    checksum = images.checksum if images.checksum is not None else torch.zeros(len(images.layouts), dtype=torch.int64, device=device)
    return View(
        tokens=hidden if spots.whole else hidden.flatten(0, 1)[spots.flat],
        real=spots.present if images.whole else spots.present & images.alive[gid],
        keep=torch.full((len(keep),), keep[0], device=device) if len(set(keep)) == 1 else to_device(keep, device),
        counts=counts,
        keeps=keep,
        most=max(keep, default=0),
        row=to_device([images.row[i] for i in owner], device),
        cells=images.cells(gid),
        patch=gid % images.slots,
        grids=[list(layout.grids) for layout in layouts],
        only=groups.view,
        crop_grids=[layout.crop_grid for layout in layouts],
        image_sizes=[layout.image_size for layout in layouts],
        sizes=images.sizes[gid],
        checksum=checksum.to(device)[to_device(owner, device)],
        layer=layer,
        memory=images.memory.setdefault(method, {}),
        per_token={name: table[gid] for (number, name), table in images.tables.items() if number == method},
    )


def remember(view: View, spots: Spots, images: Images, method: int) -> None:
    """Files the per-token memory of a View under global ids, where later Views find it."""
    target = torch.where(spots.present, spots.gid, len(images.alive))
    for name, value in view.per_token.items():
        table = value.new_zeros(len(images.alive) + 1, *value.shape[2:])
        table[target.flatten()] = value.flatten(0, 1)
        images.tables[method, name] = table[:-1]
