"""What a step answers.

Letters in shapes: `B` prompt rows, `G` image groups (one image of one prompt row, all its views), `N` visual tokens of a group, `M` text tokens
of its row, `K` kept, `D` width, `H` heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vtr.types.errors import WrongValue


@dataclass
class Selection:
    """Says which visual tokens stay, and optionally what they become.

    Args:
        keep: `(G, N)` bool; True stays. Exactly `view.keep` per row for a step with a budget.
        index: instead of `keep`: `(G, K)` int64 into N, distinct among the real ones.
        real: `(G, K)` bool for `index` rows that keep fewer than K; default all.
        tokens: new values: `(G, N, D)` beside `keep` (only kept rows are read), `(G, K, D)` beside `index`.
        assign: `(G, N)` int64 into N: the pivot a token was merged into (a kept token names itself), -1 pruned without trace
            (a ViT without an LLM has to give it back by a restoring step with a `select`).
        order: "position" (default) or "given": the order of `index` in the LLM, or in the later blocks of a ViT without one.
        grid: `(rows, cols)` where the K tokens of `index` form a smaller grid in raster order; needed by rotary and windowed ViTs.
    """

    keep: Tensor | None = None
    index: Tensor | None = None
    real: Tensor | None = None
    tokens: Tensor | None = None
    assign: Tensor | None = None
    order: Literal["position", "given"] = "position"
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.index is None):
            raise WrongValue("Selection: give keep or index, exactly one of them")
        if self.order not in ("position", "given"):
            raise WrongValue(f"Selection: order must be 'position' or 'given', got {self.order!r}")
