"""What cells will cost, and whether they fit their model, before weights are loaded.

The model is built from its config on torch's meta device, which takes no memory; plans are made for it as they are later for the real one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vtr.cost import TERA, TransformerShape, average_tokens, prefill_flops
from vtr.eval.run import results
from vtr.eval.run.cells import Cell
from vtr.eval.run.largest import Largest, largest_image, largest_video
from vtr.eval.run.runner import cell_host
from vtr.eval.run.setup import Setup, sketch, visuals_as
from vtr.eval.run.workers import Job, Surroundings, describe, scorer_of
from vtr.hosts._protocol import Host, host_of, pooled_tower
from vtr.models.loading import Checkpoint, find_checkpoint, identify, recipe_of, stored_checkpoint
from vtr.models.pixels import check_frame_limits
from vtr.planning import plan
from vtr.plans import Plan
from vtr.registry import create_method
from vtr.types import VtrError
from vtr.types.errors import WrongValue

TEXT_TOKENS = 40
"""Assumed for the text of a prompt; the visual tokens outweigh it."""


@dataclass(frozen=True)
class Forecast:
    """Of one cell, for its largest image, or video: one with the most visual tokens that the model can have, where the model says so.

    Args:
        retained: visual tokens left at the end of the LLM.
        average: visual tokens of a layer, mean over the LLM's layers.
        adaptive: the method decides itself how much stays, or the images are not known; both numbers are then upper bounds.
        tflops: one prompt through tower and LLM (a multiply-add counts once); the tower counts in full.
        of: `(height, width)` that the frames of its videos were assumed to have; None where that is known, or does not matter.
    """

    retained: int
    average: float
    adaptive: bool
    tflops: float
    of: tuple[int, int] | None = None


def misfits(setup: Setup, cells: Sequence[Cell]) -> list[tuple[Cell, Exception]]:
    """Returns the cells whose method cannot be applied to the model, each with the error.

    Raises:
        ValueError, VtrError: see `sketch`.
    """
    found: list[tuple[Cell, Exception]] = []
    host = host_of(sketch(setup))
    for cell in cells:
        try:
            if cell.task.frames:
                check_frame_limits(host, setup.pixels)
            _planned(setup, cell)
        except (ValueError, TypeError, VtrError) as error:
            found.append((cell, error))
    return found


def check_cells(setup: Setup, cells: Sequence[Cell]) -> None:
    """Refuse cells that do not fit the model.

    Raises:
        ValueError: the first reason, and how many more there are; also see `sketch`.
    """
    found = misfits(setup, cells)
    if found:
        reasons = list(dict.fromkeys(str(error) for _, error in found))
        more = len(reasons) - 1
        raise WrongValue(reasons[0] + (f" (and {more} more)" if more else ""))


def forecast(setup: Setup, cell: Cell) -> Forecast | None:
    """Tokens and cost of a cell; None where nothing here tells how large its images are.

    Raises:
        ValueError, VtrError: the method does not fit the model; see also `sketch`.
    """
    model, planned, largest = sketch(setup), _planned(setup, cell), _largest(setup, cell)
    if largest is None:
        return None
    shape = TransformerShape.from_config(model.config.get_text_config())
    per_layer = [largest.images * tokens for tokens in planned.counts(largest.tokens)]
    flops = prefill_flops(shape, [TEXT_TOKENS + tokens for tokens in per_layer], planned.frozen, TEXT_TOKENS)
    flops += largest.images * tower_flops(host_of(model), largest.grids)
    return Forecast(per_layer[-1], average_tokens(per_layer), planned.adaptive or largest.bound, flops / TERA, largest.of)


def final_keep(setup: Setup, cell: Cell, method: int) -> int | None:
    """Tokens that a method of a cell leaves by its last removal, of its largest image or video; None where nothing here tells how large that is.

    Raises:
        ValueError, VtrError: the method does not fit the model; see also `sketch`.
    """
    largest = _largest(setup, cell)
    return None if largest is None else _planned(setup, cell).final_keep(method, largest.tokens)


@dataclass(frozen=True)
class Line:
    """A cell of an estimate; `samples` is None where they are not known without downloading them, `forecast` where the images are not."""

    forecast: Forecast | None
    samples: int | None
    finished: bool


@dataclass(frozen=True)
class Estimate:
    """Cells in order, and what those cost that are not finished.

    Args:
        lines: one per cell.
        finished: how many have a result.
        tflops: of the others whose samples are known.
        unknown: how many of the others are of tasks whose samples, or their size, are not known here.
        time: a sentence, empty when nothing was measured yet.
        unseen: models of which it is not known here what is finished, because their checkpoint or device is not on this machine.
    """

    lines: list[Line]
    finished: int
    tflops: float
    unknown: int
    time: str
    unseen: list[str]


def estimate(jobs: Sequence[Job], folder: Path) -> Estimate:
    """Cost of jobs, with the time that the finished ones of the same model took as a measure.

    Args:
        jobs: that fit their models.
        folder: of results; need not exist.
    """
    lines: list[Line] = []
    speeds: dict[Setup, list[float]] = {}
    hours, known = 0.0, True
    for job in jobs:
        made = forecast(job.setup, job.cell)
        samples = None if job.cell.task.remote else len(job.cell.task.samples(job.cell.limit))
        around = _around(job.setup)
        path = results.cell_path(folder, around.fingerprint(job.cell)) if around else None
        try:
            content = results.read_cell(path) if path and path.exists() else None
        except results.ResultError:
            content = None
        if content:
            took = content["conditions"].get("seconds", 0) / max(content["summary"]["samples"], 1)
            speeds.setdefault(job.setup, []).append(took)
        lines.append(Line(made, samples, content is not None))
    left = [(job, line) for job, line in zip(jobs, lines, strict=True) if not line.finished]
    for job, line in left:
        known = known and job.setup in speeds and line.samples is not None
        hours += statistics.median(speeds[job.setup]) * (line.samples or 0) / 3600 if job.setup in speeds else 0.0
    time = f", about {hours:.1f} h on one worker as fast as those that finished" if left and known else ""
    unseen = list(dict.fromkeys(job.setup.model for job in jobs if _around(job.setup) is None))
    sized = [line.forecast.tflops * line.samples for _, line in left if line.samples is not None and line.forecast is not None]
    return Estimate(lines, len(jobs) - len(left), sum(sized), len(left) - len(sized), time, unseen)


@cache
def _around(setup: Setup) -> Surroundings | None:
    """What fingerprints need, without asking the hub; None when a checkpoint or the device is not on this machine."""
    try:
        own, scorer = (_here(name) if name else None for name in (setup.model, setup.frame_scores))
        if own is None or (setup.frame_scores and scorer is None):
            return None
        return describe(setup, *own, scorer_of(setup, *scorer) if scorer else None)
    except (ValueError, OSError, VtrError):
        return None


def _here(name: str) -> tuple[Checkpoint, dict[str, Any]] | None:
    """Returns where a checkpoint is on this machine and what it is called in fingerprints, None where it is not here."""
    checkpoint = find_checkpoint(name)
    stored = stored_checkpoint(checkpoint)
    if stored and stored.folder:
        return stored, {"name": checkpoint.source, "revision": stored.folder.name}
    return (checkpoint, identify(checkpoint)) if checkpoint.folder else None


def tower_flops(host: Host, grids: Sequence[tuple[int, int]]) -> float:
    """Multiply-adds of the whole tower for one image with views of so many `(rows, cols)` tokens.

    The weights of a block's matrices are its work for a token; inside windows a token sees a full one at most.
    """
    tower, total = host.tower, 0.0
    for rows, cols in grids:
        patches = rows * cols * tower.joins
        tokens = patches + tower.prefix_tokens
        for i, block in enumerate(tower.blocks):
            matrices = sum(weight.numel() for weight in block.parameters() if weight.ndim == 2)
            width = tower.before_attention(block).weight.numel()
            total += tokens * (matrices + 2 * tower.keys(i, patches) * width)
    return total


def _largest(setup: Setup, cell: Cell) -> Largest | None:
    checkpoint, host = find_checkpoint(setup.model), _host(setup, cell)
    given = (host, setup, checkpoint, recipe_of(setup.model, checkpoint), cell.task, cell.limit)
    if cell.task.frames and "video" in host.encode:
        return largest_video(*given)
    image, frames = largest_image(*given), cell.task.frames
    if image is None or not frames:
        return image
    if host.as_frames:  # every image is one view
        return replace(image, tokens=frames * image.tokens // len(image.grids), grids=image.grids[:1] * frames)
    return replace(image, images=frames)


def _host(setup: Setup, cell: Cell) -> Host:
    return cell_host(host_of(sketch(setup)), cell, setup.visuals)


def _planned(setup: Setup, cell: Cell) -> Plan:
    host, method = _host(setup, cell), cell.method or create_method("uniform", keep_ratio=1.0)
    scores: Any = [] if setup.frame_scores and cell.reads_frame_scores else None
    found = plan(sketch(setup), method, question="", frame_scores=scores, visuals=visuals_as(host))  # a text, for methods that need one
    cutter = found.cutter("video")
    if cell.task.frames and cutter and host.pooling is not None:
        raise pooled_tower(cutter, host.name)
    return found
