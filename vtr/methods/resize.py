"""Resize: show the vision tower a smaller image.

Paper: none; ours. What simply lowering the resolution costs, the row that tower methods have to beat.
Stage: input. Reads: grid and image size. Batch: any. Deterministic: yes.

1. Of all grids r x c with r and c the rounded-down or rounded-up side of a proportional shrink, take the one that leaves the most visual
   tokens while staying within the budget (ties: nearest to the aspect of the full grid, then fewer rows).
2. Every view of the image gets that grid. With AnyRes the tokens counted are those whose centres survive unpadding.
3. The host resizes the pixel values to that grid of patches and interpolates the position embeddings.

The budget is an upper bound here: a grid cannot have just any number of tokens. What was really left is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from vtr.ops.canvas import valid_region
from vtr.registry import register_method
from vtr.types import Budget, Card, FrameOption, Geometry, Input, Method, Rescale, Stage, Step, View


@lru_cache(maxsize=4096)
def resized_grid(
    patch_grid: tuple[int, int], keep: int, crop_grid: tuple[int, int] = (0, 0), image_size: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """The largest nearly proportional grid that leaves at most `keep` visual tokens.

    Args:
        patch_grid: `(rows, cols)` of the full view.
        keep: tokens of the whole image, all views together.
        crop_grid: `(rows, cols)` of crops beside the thumbnail, `(0, 0)` without AnyRes.
        image_size: `(height, width)` in pixels, which decides what unpadding cuts off; `(0, 0)`: nothing.

    Raises:
        ValueError: one token per view is already too many.
    """
    rows, cols = patch_grid
    best: tuple[int, float, int] | None = None
    grid = (1, 1)
    for r in range(1, rows + 1):
        for c in range(max(1, (r - 1) * cols // rows), min(cols, -(-(r + 1) * cols // rows)) + 1):
            score = (resized_tokens((r, c), patch_grid, crop_grid, image_size), -abs(r / rows - c / cols), -r)
            if score[0] <= keep and (best is None or score > best):
                best, grid = score, (r, c)
    if best is None:
        least = resized_tokens((1, 1), patch_grid, crop_grid, image_size)
        raise ValueError(f"resize: keep must be at least {least}, one token per view of this image, got {keep}; keep more or use 'pool'")
    return grid


def resized_tokens(
    grid: tuple[int, int], patch_grid: tuple[int, int], crop_grid: tuple[int, int] = (0, 0), image_size: tuple[int, int] = (0, 0)
) -> int:
    """Visual tokens of an image whose views have `grid` patches: the thumbnail, and the canvas patches whose centres unpadding keeps."""
    thumbnail = grid[0] * grid[1]
    if not crop_grid[0]:
        return thumbnail
    region = [0, crop_grid[0] * patch_grid[0], 0, crop_grid[1] * patch_grid[1]]
    if image_size[0]:
        region = valid_region(image_size, crop_grid, patch_grid, digits=7)
    down, across = (_centres_within(grid[i], patch_grid[i], crop_grid[i], region[2 * i], region[2 * i + 1]) for i in (0, 1))
    return thumbnail + down * across


def _centres_within(small: int, full: int, crops: int, first: int, end: int) -> int:
    """Along one side: how many of `crops * small` patches have their centre in the full grid's patches `first` to `end - 1`."""
    return sum(first <= crop * full + (2 * i + 1) * full // (2 * small) < end for crop in range(crops) for i in range(small))


@register_method("resize")
@dataclass(frozen=True, kw_only=True)
class Resize(Method):
    """Smaller input images; the default budget is a third, the 192 of 576 of most tables."""

    stages: ClassVar[tuple[Stage, ...]] = ("input",)
    frames_unless_told: ClassVar[FrameOption] = "each"
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=1 / 3)
    card: ClassVar[Card] = Card(
        title="Resize: a smaller input image",
        paper="none (reference row)",
        signals="grid and image size",
        cost="one interpolation of the pixels; the tower runs on fewer patches",
        exact=False,
        ours=True,
    )

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        return (Rescale(Input(), _select),)


def _select(view: View) -> list[tuple[int, int]]:
    """The new patch grid of the views of each image."""
    facts = zip(view.keeps, view.crop_grids, view.image_sizes, strict=True)
    return [resized_grid(view.grid(group), *fact) for group, fact in enumerate(facts)]
