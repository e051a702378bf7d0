"""Where the tokens of one image or video lie in the LLM's sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from vtr.types.errors import WrongValue

Grid = tuple[int, int]
Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Layout:
    """One visual, an image or a video, as the LLM reads it. All tensors are on the CPU.

    Args:
        grids: `(rows, cols)` of every view: thumbnail and crops of an image, frames of a video; views may differ.
        patch: `(L,)` int64, token id of every position of the span, -1 for a newline token. The id of a token is
            `offsets[view] + row * cols + col`.
        line: `(L,)` int64, which newline token closes the row of this token (the newline's own number on itself), -1 for none.
        crop_grid: `(rows, cols)` of crops, `(0, 0)` without AnyRes.
        image_size: original `(height, width)` in pixels, `(0, 0)` when unknown.
        kind: what it is.
        inputs: tower inputs of an image whose views are none of them; None = every view is one.
        closed: why the tower can be neither read nor cut for this image, empty where it can.
    """

    grids: tuple[Grid, ...]
    patch: Tensor
    line: Tensor
    crop_grid: Grid = (0, 0)
    image_size: Grid = (0, 0)
    kind: Kind = "image"
    inputs: int | None = None
    closed: str = ""

    @property
    def views(self) -> int:
        """Thumbnail and crops of an image, or frames of a video."""
        return len(self.grids)

    @property
    def areas(self) -> list[int]:
        """Token ids of every view."""
        return [rows * cols for rows, cols in self.grids]

    @property
    def offsets(self) -> list[int]:
        """First token id of every view."""
        return [0, *accumulate(self.areas[:-1])]

    @property
    def slots(self) -> int:
        """Token ids of the whole visual, those that unpadding cuts off included."""
        return sum(self.areas)

    @property
    def length(self) -> int:
        """Positions of the span, newline tokens included."""
        return len(self.patch)

    @cached_property
    def tokens(self) -> int:
        """Visual tokens, newline tokens excluded."""
        return int((self.patch >= 0).sum())

    @cached_property
    def view_tokens(self) -> list[int]:
        """Visual tokens of every view, after unpadding."""
        view = torch.bucketize(self.patch[self.patch >= 0], torch.tensor(self.offsets), right=True) - 1
        return torch.bincount(view, minlength=self.views).tolist()

    @cached_property
    def cells(self) -> Tensor:
        """`(slots, 3)` int64: view, row and column of every token id."""
        parts = [torch.cartesian_prod(torch.tensor([view]), torch.arange(r), torch.arange(c)) for view, (r, c) in enumerate(self.grids)]
        return torch.cat(parts)


def views_of_one_image(grids: Sequence[Grid], kind: Kind = "image", image_size: Grid = (0, 0)) -> Layout:
    """Returns the layout of views whose tokens follow each other in raster order, without newline tokens."""
    tokens = sum(rows * cols for rows, cols in grids)
    return Layout(tuple(grids), torch.arange(tokens), torch.full((tokens,), -1), image_size=image_size, kind=kind)


def frames_of_one_video(images: Sequence[Layout], tiles: bool = False) -> Layout:
    """Returns images of one view each as the frames of one video.

    Args:
        images: in order.
        tiles: nobody knows where an image begins, so that every view is a frame.

    Raises:
        ValueError: an image has several views.
    """
    if not tiles and any(layout.views > 1 for layout in images):
        raise WrongValue(f"an image has {max(layout.views for layout in images)} views, where each must be one frame")
    patches, lines, slots, count = [], [], 0, 0
    for layout in images:
        patches.append(torch.where(layout.patch >= 0, layout.patch + slots, -1))
        lines.append(torch.where(layout.line >= 0, layout.line + count, -1))
        slots, count = slots + layout.slots, count + int(layout.line.max()) + 1
    grids, closed = tuple(grid for layout in images for grid in layout.grids), next((one.closed for one in images if one.closed), "")
    return Layout(grids, torch.cat(patches), torch.cat(lines), image_size=images[0].image_size, kind="video", closed=closed)


def runs_of(visual: Tensor) -> list[int]:
    """Returns how many placeholders `visual (B, q)` stand side by side, run by run; waits for the device."""
    edges = torch.nn.functional.pad(visual, (1, 1)).to(torch.int8).diff(dim=1)
    first, last = (edges == 1).nonzero(), (edges == -1).nonzero()
    return (last - first)[:, 1].tolist()


def numbered(local: Tensor, image: int, stride: int) -> Tensor:
    """Returns numbers within one image, -1 for none, as numbers among all images that have `stride` each."""
    return torch.where(local >= 0, local + image * stride, -1)


def by_patch(layouts: Sequence[Layout], values: Sequence[Tensor], slots: int, blank: int | bool) -> Tensor:
    """Fills a table over all token ids of some images, on the host.

    Args:
        layouts: one per image.
        values: what each image has for every position of its span `(L,)`; newline tokens are passed over.
        slots: token ids per image, at least those of each layout.
        blank: for ids without a token; decides the dtype.

    Returns:
        `(images * slots,)` on the CPU.
    """
    table = torch.full((len(layouts), slots), blank)
    for row, layout, value in zip(table, layouts, values, strict=True):
        tokens = layout.patch >= 0
        row[layout.patch[tokens]] = value[tokens]
    return table.flatten()
