"""What a prefill really did, measured: read lazily, so that reporting costs nothing until somebody asks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtr.engine.llm.call import Call
from vtr.engine.selections import check_counts
from vtr.ops.labels import IGNORE, gathered_labels
from vtr.plans import Plan


@dataclass(frozen=True)
class ImageReport:
    """One image of one prompt row.

    Args:
        row, image: prompt row (beams collapsed) and number of the image in it.
        visual_tokens: tokens before any removal, newline tokens excluded.
        views: tower inputs of the image; `patch_grid` of each, `crop_grid` `(0, 0)` without AnyRes.
        image_size: original `(height, width)`, `(0, 0)` when the model does not need it.
        tokens: original patch ids, `(view * rows + row) * cols + col`, ascending.
        retained: patch ids left after the last removal, ascending.
        assignment: per entry of `tokens` the patch id it was merged into, -1 pruned; None when nothing merges.
        newlines: newline tokens left.
        per_layer: visual tokens at every LLM layer.
    """

    row: int
    image: int
    visual_tokens: int
    views: int
    patch_grid: tuple[int, int]
    crop_grid: tuple[int, int]
    image_size: tuple[int, int]
    tokens: list[int]
    retained: list[int]
    assignment: list[int] | None
    newlines: int
    per_layer: list[int]


class Report:
    """The last prefill. `images`, `sequence_lengths`, `positions`, `choosing_ms`, `average_keep`; `to_dict()` is JSON."""

    def __init__(self, plan: Plan, call: Call) -> None:
        prompt = call.prompt
        assert prompt is not None
        tokens, images = prompt.tokens, prompt.tokens.images
        self.methods = [m.to_dict() for m in plan.methods]
        self._layers = plan.llm_layers
        self._gid, self._column, self._valid = tokens.gid(), tokens.column, tokens.valid
        self._layouts, self._row, self._number = images.layouts, images.row, images.number
        self._slots, self._assign = images.slots, images.assign
        self._newlines, self._events, self._expand = prompt.newlines, prompt.events, prompt.expand
        self._clock = prompt.clock
        self._checks = list(prompt.checks)
        self.sequence_lengths = [now.shape[1] for now in call.now]
        """Length of the sequence at every LLM layer, padding and filler included."""

    @cached_property
    def choosing_ms(self) -> float:
        """Milliseconds spent computing signals and selecting; compaction excluded."""
        return self._clock.total_ms()

    def check(self) -> None:
        """Compares what every method kept with what it was asked for; the properties below do it first.

        Raises:
            VtrError: a method kept another number of tokens.
        """
        check_counts(self._checks)
        self._checks = []

    def labels(self, values: Tensor, fill: int = IGNORE) -> Tensor:
        """Gathers labels, or any numbers per token of the prompt, at the tokens that are left, as the model's own loss sees them.

        For loops that compute a loss or metrics on their own: the logits of a reduced prompt are shorter than its labels.

        Args:
            values: `(B, S)`, one per token of the prompt.
            fill: for padding, filler and the first token of a row, which nothing predicts.

        Returns:
            `(B, S')`, as long as the logits.
        """
        self.check()
        return gathered_labels(values, self._column, self._valid, fill)

    @cached_property
    def positions(self) -> list[list[int]]:
        """Per prompt row, original positions of the tokens left at the last LLM layer (the last columns of its output, in order)."""
        self.check()
        return [
            column[valid].tolist()
            for column, valid in zip(self._column.cpu()[:: self._expand], self._valid.cpu()[:: self._expand], strict=True)
        ]

    @cached_property
    def images(self) -> list[ImageReport]:
        """One entry per prompt row and image, beams collapsed."""
        self.check()
        gid = self._gid.cpu()
        assign = None if self._assign is None else self._assign.cpu()
        found = []
        for image, layout in enumerate(self._layouts):
            row = self._row[image]
            if row % self._expand:
                continue
            own = gid[row]
            left = own[(own >= 0) & (own // self._slots == image)] % self._slots
            tokens = layout.patch[layout.patch >= 0].sort().values
            merged = None
            if assign is not None:
                pivot = assign[image * self._slots + tokens]
                merged = torch.where(pivot >= 0, pivot % self._slots, -1).tolist()
            found.append(
                ImageReport(
                    row=row // self._expand,
                    image=self._number[image],
                    visual_tokens=layout.tokens,
                    views=layout.views,
                    patch_grid=layout.grids[0],
                    crop_grid=layout.crop_grid,
                    image_size=layout.image_size,
                    tokens=tokens.tolist(),
                    retained=left.sort().values.tolist(),
                    assignment=merged,
                    newlines=self._newlines[image],
                    per_layer=self._per_layer(image, layout.tokens),
                )
            )
        return found

    def _per_layer(self, image: int, tokens: int) -> list[int]:
        counts, now = [], tokens
        for layer in range(self._layers):
            for at, left in self._events:
                now = left[image] if at == layer else now
            counts.append(now)
        return counts

    @property
    def average_keep(self) -> float:
        """Visual tokens per LLM layer, mean over layers and images."""
        layers = [count for image in self.images for count in image.per_layer]
        return sum(layers) / max(len(layers), 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "methods": self.methods,
            "images": [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(image).items()} for image in self.images],
            "sequence_lengths": self.sequence_lengths,
            "choosing_ms": self.choosing_ms,
            "average_keep": self.average_keep,
        }

    def __repr__(self) -> str:
        names = " + ".join(m["name"] for m in self.methods)
        shown = ", ".join(f"{i.per_layer[-1]} of {i.visual_tokens}" for i in self.images[:4]) + (", ..." if len(self.images) > 4 else "")
        return f"Report({names}: {shown} visual tokens at the last layer, {self.average_keep:.1f} on average, {self.choosing_ms:.2f} ms choosing)"


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
