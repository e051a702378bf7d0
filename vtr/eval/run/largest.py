"""The largest image or video that a cell is asked about: how many visual tokens it has, known without weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from PIL import Image

from vtr.data.frames import video_of
from vtr.eval.run.asking import encode, seen_of, visuals_of
from vtr.eval.tasks import Task
from vtr.hosts._layout import Grid
from vtr.hosts._protocol import Host
from vtr.models.loading import Checkpoint, stored_checkpoint
from vtr.models.pixels import PixelLimits, budget_within, limit_pixels, pixels_of
from vtr.models.recipes import Recipe

_SIZES: dict[tuple[Any, ...], frozenset[tuple[int, ...]]] = {}
_ASSUMED = (640, 360)  # pixels of a frame of a benchmark, where nothing says it


@dataclass(frozen=True)
class Largest:
    """An image, or a video, of a cell.

    Args:
        tokens: visual tokens, newlines excluded.
        grids: `(rows, cols)` of tokens of every view, as the tower sees it.
        bound: no image has more, but perhaps none has as many.
        of: of a video: `(height, width)` of the frames that the recipe, or we, assumed; None where it is known, or does not matter.
        images: so many of them are in a prompt: frames where the model has no videos.
    """

    tokens: int
    grids: tuple[Grid, ...]
    bound: bool = False
    of: Grid | None = None
    images: int = 1


def largest_image(host: Host, setup: Any, checkpoint: Checkpoint, recipe: Recipe | None, task: Task, limit: int | None) -> Largest | None:
    """Returns the image with the most visual tokens, None where that is not known here.

    Where the checkpoint does not limit an image, the images of the task decide; of a task that would have to be downloaded, the most pixels that
    the processor gives an image, or what the recipe says. Where the processor is not here, there is a bound.

    Args:
        host: of the model, without weights.
        setup: see `vtr.eval.run.workers.Setup`.
        checkpoint, recipe: of the model.
        task, limit: what is asked.
    """
    if host.most_tokens is not None and host.most_tokens % host.tower.area == 0:
        return _views(host, host.most_tokens, host.most_tokens // host.tower.area)
    processor = _processor(checkpoint)
    if processor is not None:
        limit_pixels(host, processor, setup.pixels)
        if not task.remote:
            return max((_of_size(host, processor, size) for size in _sizes(task, limit)), key=lambda one: one.tokens)
    if host.token_budgets:
        tokens = processor.image_processor.max_soft_tokens if processor is not None else budget_within(host, setup.pixels)
        return Largest(tokens, ((1, tokens),), bound=True) if tokens else None
    least, pixels = _limits(host, setup.pixels, processor, recipe)
    if host.pixel_limits is not None and pixels:
        unit = host.tower.patch_size * math.isqrt(host.tower.joins)
        tokens = pixels // unit**2
        if not task.remote:
            tokens = max(min(_covering(size, unit, least), tokens) for size in _sizes(task, limit))
        return Largest(tokens, ((1, tokens),), bound=True)
    known = recipe.tokens if recipe is not None else {}
    return _views(host, known["most"], known["most_views"], bound=True) if known else None


def largest_video(host: Host, setup: Any, checkpoint: Checkpoint, recipe: Recipe | None, task: Task, limit: int | None) -> Largest | None:
    """Returns the video with the most visual tokens, None where that is not known here. Every one is taken to have as many frames as the task shows.

    Where frames of any size have as many tokens, the processor or the recipe says how many. Elsewhere the videos of the task decide, or the size
    that the recipe assumes.

    Args:
        host, setup, checkpoint, recipe, task, limit: see `largest_image`; the model and the task have videos.
    """
    frames, processor = task.frames or 1, _processor(checkpoint)
    if processor is not None:
        limit_pixels(host, processor, setup.pixels)
        if host.pixel_limits is None:
            return _of_clip(host, processor, (*_ASSUMED, frames))
        if not task.remote:
            return max((_of_clip(host, processor, clip) for clip in _clips(task, limit)), key=lambda one: one.tokens)
    known = recipe.tokens.get("video") if recipe is not None else None
    if known is None:
        return None if processor is None else replace(_of_clip(host, processor, (*_ASSUMED, frames)), of=_ASSUMED[::-1])
    joins = known.get("joins", 1)
    views, view = -(-frames // joins), round(known["per_frame"] * joins)
    unit = host.tower.patch_size * math.isqrt(host.tower.joins)
    if "of" in known and setup.pixels.given:
        view = _resized(known["of"], unit, view, setup.pixels)
    view = min(view, known.get("most", views * view) // views)
    grid = host.tower.patch_grid if host.pooling is not None else None
    return Largest(views * view, (grid or (1, view),) * views, of=tuple(known["of"]) if "of" in known else None)


def _resized(size: list[int], unit: int, tokens: int, limits: PixelLimits) -> int:
    """Returns the tokens of `unit` pixels that the processor of Qwen-VL makes of a frame of `[height, width]`, `tokens` without limits."""
    most, least = limits.max_pixels, limits.min_pixels
    if most and tokens * unit**2 > most:
        scale = min(1.0, math.sqrt(most / (size[0] * size[1])))
        return math.prod(max(1, math.floor(side * scale / unit)) for side in size)
    if least and tokens * unit**2 < least:
        scale = math.sqrt(least / (size[0] * size[1]))
        return math.prod(math.ceil(side * scale / unit) for side in size)
    return tokens


def _clips(task: Task, limit: int | None) -> frozenset[tuple[int, ...]]:
    """Returns width, height and number of frames of the videos of a task that is here."""
    key = (*task.identity.values(), limit, "clips")
    if key not in _SIZES:
        videos = (video for sample in task.samples(limit) for video in seen_of(sample, whole=True)[1])
        _SIZES[key] = frozenset((*video.frames[0].size, len(video.frames)) for video in videos)
    return _SIZES[key]


def _of_clip(host: Host, processor: Any, clip: tuple[int, ...]) -> Largest:
    """Returns what the processor makes of a video of `(width, height)` pixels and so many frames."""
    width, height, frames = clip
    video = video_of([Image.new("RGB", (width, height))] * frames)
    (layout,) = visuals_of(host, encode(processor, ["?"], [[]], [[video]]))
    seen = host.tower.patch_grid if host.pooling is not None else None
    return Largest(layout.tokens, (seen,) * layout.views if seen else layout.grids)


def _views(host: Host, tokens: int, views: int, bound: bool = False) -> Largest:
    """Returns an image of so many views that are alike."""
    return Largest(tokens, (host.tower.patch_grid or (1, -(-tokens // views)),) * views, bound)


def _limits(host: Host, asked: PixelLimits, processor: Any, recipe: Recipe | None) -> tuple[int, int]:
    """Returns the fewest and the most pixels of an image, 0 where they are not known."""
    if processor is not None:
        return pixels_of(host, processor) or (0, 0)
    known = recipe.image if recipe is not None else {}
    return asked.min_pixels or known.get("min_pixels", 0), asked.max_pixels or known.get("max_pixels", 0)


def _covering(size: tuple[int, ...], unit: int, least: int) -> int:
    """Returns the squares of `unit` pixels that cover an image of `(width, height)` pixels, enlarged to at least so many pixels."""
    scale = max(1.0, math.sqrt(least / (size[0] * size[1])))
    return math.ceil(size[0] * scale / unit) * math.ceil(size[1] * scale / unit)


def _sizes(task: Task, limit: int | None) -> frozenset[tuple[int, ...]]:
    key = (*task.identity.values(), limit)
    if key not in _SIZES:
        _SIZES[key] = frozenset(image.size for sample in task.samples(limit) for image in seen_of(sample, whole=False)[0])
    return _SIZES[key]


def _of_size(host: Host, processor: Any, size: tuple[int, ...]) -> Largest:
    """Returns what the processor makes of an image of `(width, height)` pixels."""
    (layout,) = host.images_of(encode(processor, ["?"], [[Image.new("RGB", (size[0], size[1]))]], settings=host.frame_settings))
    return Largest(layout.tokens, layout.grids)


@cache
def _loaded(source: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError):  # of a checkpoint of the hub, of which only the config is here
        return None


def _processor(checkpoint: Checkpoint) -> Any:
    """Returns the processor of a checkpoint, or None where it is not on this machine; each time as it is stored."""
    here = checkpoint if checkpoint.folder else stored_checkpoint(checkpoint)
    return copy.deepcopy(_loaded(here.source)) if here is not None else None
