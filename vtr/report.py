"""Reports: what a prefill, or a batch of a ViT without an LLM, really did. Read lazily, so that nothing is paid until somebody asks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtr.engine.clock import Clock
from vtr.engine.dense_run import DenseRun
from vtr.engine.llm.call import Call
from vtr.engine.selections import check_counts
from vtr.engine.tokens import Places
from vtr.hosts._layout import Grid, Kind, Layout
from vtr.ops.labels import IGNORE, gathered_labels
from vtr.plans import Plan
from vtr.types import VtrError


@dataclass(frozen=True)
class ImageReport:
    """One image of one prompt row, or of the batch of a ViT without an LLM.

    Args:
        row, image: prompt row (beams collapsed) and number of the image in it; without an LLM the number of the image in the batch, and 0.
        visual_tokens: tokens before any removal, newline tokens excluded.
        views: tower inputs of the image, or windows of a ViT that attends in windows; `patch_grid` of each, `crop_grid` `(0, 0)` without AnyRes.
        image_size: original `(height, width)`, `(0, 0)` when the model does not need it.
        tokens: original patch ids, `(view * rows + row) * cols + col`, ascending.
        retained: patch ids left after the last removal, ascending; without an LLM those left before all were given back.
        assignment: per entry of `tokens` the patch id it was merged into, -1 pruned; None when nothing merges.
        newlines: newline tokens left.
        per_layer: visual tokens at every LLM layer; without an LLM at every block that ran, of the image that has most.
        kind: an image or a video, whose views are its frames; `frames` and `per_frame`, the tokens left of each, are of videos only.
        grids: grid of every view where they differ, as those of a thumbnail and a canvas that the model interpolates; else None. Ids go on from
            view to view.
    """

    row: int
    image: int
    visual_tokens: int
    views: int
    patch_grid: Grid
    crop_grid: Grid
    image_size: Grid
    tokens: list[int]
    retained: list[int]
    assignment: list[int] | None
    newlines: int
    per_layer: list[int]
    grids: list[list[int]] | None = None
    kind: Kind = "image"
    frames: int | None = None
    per_frame: list[int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as plain JSON types; those of videos only for a video."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return fields if self.kind == "video" else {n: v for n, v in fields.items() if n not in ("kind", "frames", "per_frame")}


@dataclass
class _Seen:
    """What a report keeps of a run; nothing here waits for a device.

    Args:
        layouts: of the images of all rows; slots: patch ids of each.
        row, number: row of every image, and its number there; rows: how many rows of `places` an image has.
        places: tokens that are left; None when no step was reached.
        gid: `(R, S)` global id at each of their positions.
        assign: `(images * slots,)` global id that each original token is merged into, -1 pruned; None when nothing merges.
        newlines: newline tokens left of each image.
        events: `(layer, visual tokens left of each image)` after every removal; None where `lengths` says it.
        lengths: length of the sequence at every layer.
        expand: how often prompt rows repeat (beams).
    """

    layouts: Sequence[Layout]
    row: Sequence[int]
    number: Sequence[int]
    slots: int
    places: Places | None
    gid: Tensor | None
    assign: Tensor | None
    newlines: Sequence[int]
    events: Sequence[tuple[int, list[int]]] | None
    lengths: list[int]
    expand: int = 1
    rows: int = 1


class Report:
    """The last prefill with images under a reduction, or the last batch of a ViT without an LLM; from `Reduction.report()`.

    `print(report)` sums it up, `to_dict()` is JSON, `draw(picture)` shows what was retained.
    """

    methods: list[dict[str, Any]]
    """Name and settings of every method, as `vtr.method_from` reads them."""
    grid: Grid | None
    """`(rows, cols)` of tokens of an image; None with an LLM, where `images` have grids of their own."""
    small_grid: Grid | None
    """`(rows, cols)` that an image (a window) of a ViT was reduced to; None where what is left forms no grid."""
    prefix_tokens: int
    """CLS and registers in front of the patches of a ViT without an LLM; 0 with an LLM."""
    resized: bool
    """Whether tokens are fewer only because images were made smaller in front of the tower."""

    def __init__(self, plan: Plan, seen: _Seen, clock: Clock, checks: Iterable[Any]) -> None:
        self.methods = [method.to_dict() for method in plan.methods]
        removing = [item.step.action for item in plan.steps if item.removes]
        self.resized = bool(removing) and set(removing) == {"input"}
        self.grid = self.small_grid = None
        self.prefix_tokens = 0
        self._attended: list[Tensor] = []
        self._in_front = self._evicted = 0
        self._layers, self._seen, self._clock, self._checks = plan.llm_layers, seen, clock, list(checks)

    @classmethod
    def of_prompt(cls, plan: Plan, call: Call) -> Report:
        """Makes the report of a prefill, when its last layer has run."""
        prompt = call.prompt
        assert prompt is not None
        tokens, images = prompt.tokens, prompt.tokens.images
        seen = _Seen(
            layouts=images.layouts,
            row=images.row,
            number=images.number,
            slots=images.slots,
            places=tokens.snapshot(),
            gid=tokens.gid(),
            assign=images.assign,
            newlines=prompt.newlines,
            events=prompt.events,
            lengths=[now.shape[1] for now in call.now],
            expand=prompt.expand,
        )
        report = cls(plan, seen, prompt.clock, prompt.checks)
        report._attended = prompt.attended
        report._in_front = max((item.step.layer for item in plan.steps if item.step.earlier_keys), default=0)
        report._evicted = seen.lengths[report._in_front] if call.cache is not None else max(seen.lengths)
        return report

    @classmethod
    def of_encoder(cls, run: DenseRun) -> Report:
        """Makes the report of a batch of a ViT without an LLM, when its last block has run."""
        images = run.tokens.images if run.rows else None
        every = torch.arange(run.n)
        windows = run.rows // run.images if run.rows else 1
        numbers = range(run.images)
        seen = _Seen(
            layouts=images.layouts if images else [Layout((run.grid,), every, every)] * run.images,
            row=numbers,
            number=[0] * run.images,
            slots=run.n * windows,
            places=run.tokens.snapshot() if run.rows else None,
            gid=run.tokens.gid() if run.rows else None,
            assign=images.assign if images else None,
            newlines=[0] * run.images,
            events=None,
            lengths=[length + run.host.prefix_tokens for length in run.lengths],
            rows=windows,
        )
        report = cls(run.plan, seen, run.clock, run.checks)
        report.grid, report.small_grid, report.prefix_tokens = run.grid, run.small, run.host.prefix_tokens
        return report

    # ---- of the whole run
    @cached_property
    def choosing_ms(self) -> float:
        """Milliseconds spent computing signals and selecting, and restoring in a ViT without an LLM; compaction excluded."""
        return self._clock.total_ms()

    def check(self) -> None:
        """Compares what every method kept with what it was asked for; what is read of a report does it first.

        Raises:
            VtrError: a method kept another number of tokens.
        """
        check_counts(self._checks)
        self._checks = []

    @property
    def sequence_lengths(self) -> list[int]:
        """Length of the sequence at every LLM layer, padding and filler included; without an LLM at every block that ran."""
        return self._seen.lengths

    @property
    def cache_lengths(self) -> list[int]:
        """Keys that the prompt left in the KV cache of every LLM layer: as `sequence_lengths`, but for layers whose keys went later."""
        return [min(own, self._evicted) for own in self.sequence_lengths[: self._in_front]] + self.sequence_lengths[self._in_front :]

    @property
    def average_keep(self) -> float:
        """Visual tokens per layer, mean over layers and images."""
        layers = [count for image in self.images for count in image.per_layer]
        return sum(layers) / max(len(layers), 1)

    @property
    def retained(self) -> int:
        """Tokens that were left in the end of the image that has most; in a ViT without an LLM before all were given back."""
        if self.grid is None:
            return max((len(image.retained) for image in self.images), default=0)
        places = self._seen.places
        return self._seen.slots if places is None else places.column.shape[1] * self._seen.rows

    @property
    def tokens_per_block(self) -> list[int]:
        """Visual tokens at every LLM layer of the image that has most; without an LLM at every block that ran.

        Prefix tokens are excluded; a block that merges inside counts what comes in.
        """
        self.check()
        if self.grid is None:
            return [max(counts) for counts in zip(*(image.per_layer for image in self.images), strict=True)]
        return [length - self.prefix_tokens for length in self._seen.lengths]

    @property
    def attended(self) -> list[list[int]]:
        """Per new token so far, the visual tokens of every image and video that it attended to behind a step at new tokens; empty without
        such a step."""
        return [counts.tolist() for counts in self._attended]

    @cached_property
    def positions(self) -> list[list[int]]:
        """Per prompt row, original positions of the tokens left at the last LLM layer (the last columns of its output, in order).

        Without an LLM, per image, the patch ids of the tokens that were left.
        """
        self.check()
        places, every = self._seen.places, self._seen.expand
        if self.grid is not None or places is None:
            return [image.retained for image in self.images]
        rows = zip(places.column.cpu()[::every], places.valid.cpu()[::every], strict=True)
        return [column[valid].tolist() for column, valid in rows]

    @cached_property
    def assignment(self) -> list[list[int]]:
        """Per row and original token, the token whose place it shares, -1 for one that was pruned without trace; empty when nothing merges.

        A row is an image, or a window of one in a ViT that attends in windows, whose tokens are counted from 0.
        """
        if self._seen.assign is None:
            return []
        self.check()
        if self.grid is None:
            return [image.assignment for image in self.images if image.assignment is not None]
        length = self._seen.slots // self._seen.rows
        return torch.where(self._seen.assign >= 0, self._seen.assign % length, -1).view(-1, length).tolist()

    def labels(self, values: Tensor, fill: int = IGNORE) -> Tensor:
        """Gathers labels, or any numbers per token of the prompt, at the tokens that are left, as the model's own loss sees them.

        For loops that compute a loss or metrics on their own: the logits of a reduced prompt are shorter than its labels.

        Args:
            values: `(B, S)`, one per token of the prompt.
            fill: for padding, filler and the first token of a row, which nothing predicts.

        Returns:
            `(B, S')`, as long as the logits.

        Raises:
            VtrError: the model has no LLM, so that there is no prompt.
        """
        self.check()
        places = self._seen.places
        if self.grid is not None or places is None:
            raise VtrError("Report.labels: gathers labels of a prompt, and this model has no LLM; its outputs have their full length")
        return gathered_labels(values, places.column, places.valid, fill)

    # ---- of every image
    @cached_property
    def images(self) -> list[ImageReport]:
        """One entry per prompt row and image, beams collapsed; without an LLM one per image of the batch."""
        self.check()
        seen = self._seen
        gid = None if seen.gid is None else seen.gid.cpu()
        assign = None if seen.assign is None else seen.assign.cpu()
        found = []
        for image, (layout, row) in enumerate(zip(seen.layouts, seen.row, strict=True)):
            if row % seen.expand:
                continue
            patch = layout.patch.cpu()
            left = tokens = patch[patch >= 0].sort().values
            if gid is not None:
                own = gid[row * seen.rows : (row + 1) * seen.rows]
                left = (own[(own >= 0) & (own // seen.slots == image)] % seen.slots).sort().values
            merged = None
            if assign is not None:
                pivot = assign[image * seen.slots + tokens]
                merged = torch.where(pivot >= 0, pivot % seen.slots, -1).tolist()
            found.append(
                ImageReport(
                    row=row // seen.expand,
                    image=seen.number[image],
                    visual_tokens=len(tokens),
                    views=layout.views,
                    patch_grid=layout.grids[0],
                    crop_grid=layout.crop_grid,
                    image_size=layout.image_size,
                    tokens=tokens.tolist(),
                    retained=left.tolist(),
                    assignment=merged,
                    newlines=seen.newlines[image],
                    per_layer=self._per_layer(image, len(tokens)),
                    grids=[list(grid) for grid in layout.grids] if len(set(layout.grids)) > 1 else None,
                    kind=layout.kind,
                    frames=layout.views if layout.kind == "video" else None,
                    per_frame=_by_view(layout, left) if layout.kind == "video" else None,
                )
            )
        return found

    def _per_layer(self, image: int, tokens: int) -> list[int]:
        if self._seen.events is None:
            return self.tokens_per_block
        counts, now = [], tokens
        for layer in range(self._layers):
            for at, left in self._seen.events:
                now = left[image] if at == layer else now
            counts.append(now)
        return counts

    def draw(self, picture: Any, number: int = 0, processor: Any = None) -> Any:
        """Draws which patches of an image were retained, removed and merged; see `vtr.draw`.

        Args:
            picture: the image as PIL opens it, or the pixels of its views.
            number: of the image in `images`.
            processor: the model's, which says what the tower saw of the image.

        Returns:
            A PIL image.
        """
        from vtr.viz import draw

        return draw(picture, self, number, processor)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain JSON types; without an LLM what all images of the batch share."""
        if self.grid is None:
            return {
                "methods": self.methods,
                "images": [image.to_dict() for image in self.images],
                "sequence_lengths": self.sequence_lengths,
                "choosing_ms": self.choosing_ms,
                "average_keep": self.average_keep,
            }
        return {
            "methods": self.methods,
            "images": len(self._seen.layouts),
            "grid": list(self.grid),
            "small_grid": None if self.small_grid is None else list(self.small_grid),
            "prefix_tokens": self.prefix_tokens,
            "tokens_per_block": self.tokens_per_block,
            "retained": self.retained,
            "choosing_ms": self.choosing_ms,
        }

    def __repr__(self) -> str:
        names = " + ".join(method["name"] for method in self.methods)
        if self.grid is None:
            shown = ", ".join(f"{i.per_layer[-1]} of {i.visual_tokens}" for i in self.images[:4]) + (
                ", ..." if len(self.images) > 4 else ""
            )
            counts = f"{shown} visual tokens at the last layer, {self.average_keep:.1f} on average"
        else:
            fewest = min([*self.tokens_per_block, self.retained])
            counts = f"{len(self._seen.layouts)} images, {self.grid[0] * self.grid[1]} tokens, {fewest} at the fewest"
        return f"Report({names}: {counts}, {self.choosing_ms:.2f} ms choosing)"


def _by_view(layout: Layout, patches: Tensor) -> list[int]:
    """Returns how many of some token ids belong to every view."""
    view = torch.bucketize(patches, torch.tensor(layout.offsets), right=True) - 1
    return torch.bincount(view, minlength=layout.views).tolist()


def warn_small_images(plan: Plan, call: Call) -> bool:
    """Warns when an image has fewer visual tokens than `keep` asks for, so that all its tokens stayed; True when it did."""
    assert call.prompt is not None
    fewest = min(layout.tokens for layout in call.prompt.tokens.images.layouts)
    for method in plan.methods:
        if method.budget is not None and method.budget.keep is not None and method.budget.keep > fewest:
            warnings.warn(
                f"{method.name}: keep={method.budget.keep} is more than the {fewest} visual tokens of an image; all its tokens stay",
                stacklevel=3,
            )
            return True
    return False
