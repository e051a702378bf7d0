"""Makes Views of tokens: which tokens a method sees together, how many it is to leave, and what it noted about them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vtr.engine.images import Images, to_device
from vtr.engine.tokens import Groups, Spots
from vtr.hosts._layout import Layout
from vtr.ops.topk import quota
from vtr.plans import PlanStep
from vtr.types import View


def by_image(layouts: list[Layout], slots: int, among: Sequence[int] | None = None) -> Groups:
    """Returns one group per image, or per image `among` them: all its views."""
    owner = list(range(len(layouts)) if among is None else among)
    return Groups(owner, [image * slots for image in owner], [layouts[image].slots for image in owner])


def by_view(layouts: list[Layout], slots: int, rows: bool = False, among: Sequence[int] | None = None, alone: bool = False) -> Groups:
    """Returns one group per view, of all images or of those `among` them.

    Args:
        layouts: of all images.
        slots: global ids of an image.
        rows: the rows of the tokens are the views, in this order.
        among: indices of images, ascending.
        alone: a method sees the views as images.
    """
    first = list(accumulate([layout.views for layout in layouts], initial=0))
    chosen = range(len(layouts)) if among is None else among
    owner = [image for image in chosen for _ in layouts[image].grids]
    start = [image * slots + offset for image in chosen for offset in layouts[image].offsets]
    length = [area for image in chosen for area in layouts[image].areas]
    view = [view for image in chosen for view in range(layouts[image].views)]
    number = [first[image] + view for image in chosen for view in range(layouts[image].views)]
    return Groups(owner, start, length, rows, view, number, alone)


def groups_of(item: PlanStep, layouts: list[Layout], slots: int, rows: bool, among: Sequence[int] | None = None) -> Groups:
    """Returns the rows that the View of a step has: images or videos, or their views.

    Args:
        item: the step.
        layouts: of all images, of which those `among` them are of one kind; slots: global ids of each.
        rows: the rows of the tokens are views, in this order.
        among: indices of images, ascending; None = all.
    """
    kind = layouts[0 if among is None else among[0]].kind
    if not item.by_view(kind):
        return by_image(layouts, slots, among)
    return by_view(layouts, slots, rows, among, alone=item.alone(kind))


def quotas(target: list[int], owner: list[int], counts: list[int]) -> list[int]:
    """Shares what images are to leave among their views, by largest remainder of the tokens that these have.

    Args:
        target: tokens to leave of each image.
        owner: image of each view, ascending; counts: tokens of each view.
    """
    starts = {image: i for i, image in reversed(list(enumerate(owner)))}
    view = [i - starts[image] for i, image in enumerate(owner)]
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
    kind = layouts[0].kind
    cells, patch, grids = images.cells(gid), gid % images.slots, [list(layout.grids) for layout in layouts]
    if groups.alone:
        assert groups.view is not None
        offsets = [layout.offsets[view] for layout, view in zip(layouts, groups.view, strict=True)]
        cells, patch = cells * to_device([0, 1, 1], device), patch - to_device(offsets, device)[:, None]
        grids = [[own[view]] for own, view in zip(grids, groups.view, strict=True)]
    checksum = images.checksum if images.checksum is not None else torch.zeros(len(images.layouts), dtype=torch.int64, device=device)
    return View(
        tokens=hidden if spots.whole else hidden.flatten(0, 1)[spots.flat],
        real=spots.present if images.whole else spots.present & images.alive[gid],
        keep=torch.full((len(keep),), keep[0], device=device) if len(set(keep)) == 1 else to_device(keep, device),
        counts=counts,
        keeps=keep,
        most=max(keep, default=0),
        row=to_device([images.row[i] for i in owner], device),
        cells=cells,
        patch=patch,
        grids=grids,
        only=None if groups.alone else groups.view,
        crop_grids=[layout.crop_grid for layout in layouts],
        image_sizes=[layout.image_size for layout in layouts],
        sizes=images.sizes[gid],
        checksum=checksum.to(device)[to_device(owner, device)],
        layer=layer,
        memory=images.memory.setdefault((method, kind), {}),
        kinds=["image" if groups.alone else layout.kind for layout in layouts],
        frames=[layout.views if layout.kind == "video" and not groups.alone else None for layout in layouts],
        per_token={name: table[gid] for (number, name), table in images.tables.items() if number == method},
    )


def remember(view: View, spots: Spots, images: Images, method: int) -> None:
    """Files the per-token memory of a View under global ids, where later Views find it."""
    target = torch.where(spots.present, spots.gid, len(images.alive))
    for name, value in view.per_token.items():
        table = value.new_zeros(len(images.alive) + 1, *value.shape[2:])
        old = images.tables.get((method, name))
        if old is not None and old.shape[1:] == value.shape[2:]:  # of visuals of another kind
            table[:-1] = old
        table[target.flatten()] = value.flatten(0, 1)
        images.tables[method, name] = table[:-1]
