"""What one run of a dense ViT really did."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cached_property
from typing import Any

from torch import Tensor

from vtr.apply.dense_run import DenseRun


class DenseReport:
    """The last batch of images. `grid`, `small_grid`, `tokens_per_block`, `images`, `choosing_ms`; `to_dict()` is JSON."""

    def __init__(self, run: DenseRun) -> None:
        self.methods = json.loads(json.dumps([{"name": m.name, **asdict(m)} for m in run.plan.methods], default=str))
        self.images: int = run.images
        """Images of the batch."""
        self.grid: tuple[int, int] = run.grid
        """`(rows, cols)` of tokens of an image."""
        self.small_grid: tuple[int, int] | None = run.small
        """`(rows, cols)` that an image (a window) was reduced to; None where what is left forms no grid."""
        self.prefix_tokens: int = run.host.prefix_tokens
        self.tokens_per_block: list[int] = run.lengths
        """Tokens of an image at every block that ran, prefix tokens excluded; a block that merges inside counts what it gets."""
        self._owner: Tensor | None = run.owner if run.rows else None
        self._patch: Tensor | None = run.patch if run.rows else None
        self._clock = run.clock

    @cached_property
    def choosing_ms(self) -> float:
        """Milliseconds spent clustering or merging and restoring."""
        return self._clock.total_ms()

    @cached_property
    def assignment(self) -> list[list[int]]:
        """Per row (an image, or a window of one) and original token: the token whose place it shares; empty when nothing was reduced."""
        if self._owner is None or self._patch is None:
            return []
        return self._patch.gather(1, self._owner).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the assignment as plain JSON types."""
        return {
            "methods": self.methods,
            "images": self.images,
            "grid": list(self.grid),
            "small_grid": None if self.small_grid is None else list(self.small_grid),
            "prefix_tokens": self.prefix_tokens,
            "tokens_per_block": self.tokens_per_block,
            "choosing_ms": self.choosing_ms,
        }

    def __repr__(self) -> str:
        names = " + ".join(m["name"] for m in self.methods)
        counts = f"{self.grid[0] * self.grid[1]} tokens, {min(self.tokens_per_block, default=0)} at the fewest"
        return f"DenseReport({names}: {self.images} images, {counts}, {self.choosing_ms:.2f} ms choosing)"
