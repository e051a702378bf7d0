"""What one run of a dense ViT really did."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtr.engine.dense_run import DenseRun
from vtr.engine.selections import check_counts


class DenseReport:
    """The last batch of images. `grid`, `small_grid`, `tokens_per_block`, `retained`, `images`, `choosing_ms`; `to_dict()` is JSON."""

    def __init__(self, run: DenseRun) -> None:
        self.methods = [m.to_dict() for m in run.plan.methods]
        self.images: int = run.images
        """Images of the batch."""
        self.grid: tuple[int, int] = run.grid
        """`(rows, cols)` of tokens of an image."""
        self.small_grid: tuple[int, int] | None = run.small
        """`(rows, cols)` that an image (a window) was reduced to; None where what is left forms no grid."""
        self.prefix_tokens: int = run.host.prefix_tokens
        self.retained: int = run.tokens.column.shape[1] * (run.rows // run.images) if run.rows else run.n
        """Tokens that were left in the end of the image that has most, before all were given back."""
        self._checks = run.checks
        self._lengths = run.lengths
        self._assign: Tensor | None = run.tokens.images.assign if run.rows else None
        self._rows, self._n = run.rows, run.n
        self._clock = run.clock

    def check(self) -> None:
        """Compares what every step kept with what it was asked for; what is read of a report does it first.

        Raises:
            VtrError: the method kept another number of tokens.
        """
        check_counts(self._checks)
        self._checks = []

    @property
    def tokens_per_block(self) -> list[int]:
        """Tokens of an image at every block that ran, prefix tokens excluded; a block that merges inside counts what it gets."""
        self.check()
        return self._lengths

    @cached_property
    def choosing_ms(self) -> float:
        """Milliseconds spent clustering or merging and restoring."""
        return self._clock.total_ms()

    @cached_property
    def assignment(self) -> list[list[int]]:
        """Per row (an image, or a window of one) and original token: the token whose place it shares, -1 for one that was pruned without
        trace; empty when nothing was reduced."""
        if self._assign is None:
            return []
        self.check()
        return torch.where(self._assign >= 0, self._assign % self._n, -1).view(self._rows, self._n).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the assignment as plain JSON types."""
        return {
            "methods": self.methods,
            "images": self.images,
            "grid": list(self.grid),
            "small_grid": None if self.small_grid is None else list(self.small_grid),
            "prefix_tokens": self.prefix_tokens,
            "tokens_per_block": self.tokens_per_block,
            "retained": self.retained,
            "choosing_ms": self.choosing_ms,
        }

    def __repr__(self) -> str:
        names = " + ".join(m["name"] for m in self.methods)
        counts = f"{self.grid[0] * self.grid[1]} tokens, {min([*self.tokens_per_block, self.retained])} at the fewest"
        return f"DenseReport({names}: {self.images} images, {counts}, {self.choosing_ms:.2f} ms choosing)"
