"""What a step sees.

Letters in shapes: `B` prompt rows, `G` image groups (one image of one prompt row, all its views), `N` visual tokens of a group, `M` text tokens
of its row, `K` kept, `D` width, `H` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.types.errors import VtrError
from vtr.types.signals import Signal

Grid = tuple[int, int]
"""`(rows, cols)`."""
Kind = Literal["image", "video"]


class Signals(dict[Signal, Any]):
    """What a step asked for; another signal is refused with the name of the method."""

    def __init__(self, found: Any = (), method: str = "") -> None:  # as a dict is made, which is what `asdict` does
        super().__init__(found)
        self.method = method

    def __missing__(self, signal: Any) -> Any:
        raise VtrError(
            f"{self.method}: reads {signal} in select, but its step asked for {', '.join(map(str, self)) or 'no signal'}; add it to the needs of "
            "that step"
        )


def with_named_signals(method: str, select: Callable[[View], Any]) -> Callable[[View], Any]:
    """Returns a `select` whose View refuses signals that the step of this method did not ask for."""

    @wraps(select)
    def asked(view: View) -> Any:
        if not torch.compiler.is_compiling():
            view.signals = Signals(view.signals, method)
        return select(view)

    return asked


class Text(NamedTuple):
    """Holds the text tokens of each group's prompt row at this point.

    `tokens (G, M, D)`, `real (G, M)` bool, `instruction (G, M)` bool (real text after the first visual token of this call, without what
    stands between tokens of one image, such as break tokens; if there is none, all real text of this call); the rest is system text. Never
    another image's tokens.
    """

    tokens: Tensor
    real: Tensor
    instruction: Tensor


@dataclass
class View:
    """Shows a step the visual tokens: one row per image group (or per view, with `per="view"`). No batch rows, padding or newlines.

    Args:
        tokens: visual tokens `(G, N, D)` in position order (view, then raster; at the boundary thumbnail, then canvas raster).
        real: `(G, N)` bool, True where a row has a token that may be chosen.
        keep: `(G,)` int64, tokens this step is to leave (already limited to what the group has).
        counts, keeps: `real.sum(1)` and `keep` as Python ints, so that nothing has to wait for the device.
        most: the largest of `keeps`.
        row: `(G,)` int64, prompt row of the group.
        cells: `(G, N, 3)` int64: view (0 = thumbnail or the only view), row, column inside the view's patch grid.
        patch: `(G, N)` int64, original patch id: that of the view's first token, then `row * cols + column` on.
        grids: per group the grid `(rows, cols)` of tokens of every view of its image; those of another group may differ, see `grid`.
        crop_grids: per group `(rows, cols)` of crops, `(0, 0)` without AnyRes.
        image_sizes: per group `(height, width)` in pixels of the original image, `(0, 0)` where the host does not know.
        kinds: per group what it is, an image or a video, whose views are its frames; default all images.
        frames: per group the frames of a video, None for an image.
        only: where rows are single views, which view of its image each is; None where rows are whole images.
        sizes: `(G, N)` float32, how many original tokens a token stands for.
        checksum: `(G,)` int64 of the image's pixel values; the only seed a random choice may use besides its own.
        layer: layer the step is at.
        text: text of the row; None in the tower.
        signals: what the step's `needs` ask for.
        scaling: for signals `q`, `k`, `v`, `next_q` and `next_k`: the factor that the attention they belong to has on its logits, usually
            `d ** -0.5`; `view.scaling.get(signal)` is None where it is not known.
        memory: what earlier steps of the same method noted in this call; notes per token go into `per_token`.
        per_token: name -> `(G, N, ...)` tensors, which follow their tokens at every later removal.
        final_norm: the LLM's final norm as a function of tokens; None in the tower.
    """

    tokens: Tensor
    real: Tensor
    keep: Tensor
    counts: list[int]
    keeps: list[int]
    most: int
    row: Tensor
    cells: Tensor
    patch: Tensor
    grids: list[list[Grid]]
    crop_grids: list[Grid]
    image_sizes: list[tuple[int, int]]
    sizes: Tensor
    checksum: Tensor
    layer: int = 0
    text: Text | None = None
    signals: Mapping[Signal, Any] = field(default_factory=dict)
    scaling: Mapping[Signal, float] = field(default_factory=dict)
    memory: MutableMapping[str, Any] = field(default_factory=dict)
    per_token: MutableMapping[str, Tensor] = field(default_factory=dict)
    final_norm: Callable[[Tensor], Tensor] | None = None
    kinds: list[Kind] = field(default_factory=list)
    frames: list[int | None] = field(default_factory=list)
    only: list[int] | None = None

    def __post_init__(self) -> None:
        self.kinds = self.kinds or ["image"] * len(self.grids)
        self.frames = self.frames or [None] * len(self.grids)

    @property
    def views(self) -> int:
        """Returns the most views that the image of a group has."""
        return max(map(len, self.grids))

    @property
    def full(self) -> bool:
        """Whether no row has padding, as the host knows."""
        return set(self.counts) == {self.real.shape[1]}

    def grid(self, group: int) -> Grid:
        """Returns the grid of the views of a group, all of which have the same, or of the single view that the group is.

        Raises:
            VtrError: its views have different grids.
        """
        own = self.grids[group]
        if self.only is not None:
            return own[self.only[group]]
        if any(grid != own[0] for grid in own):
            raise VtrError(
                f"the views of an image have different grids, {', '.join(map(str, dict.fromkeys(own)))}, where one is needed; use a method that "
                "sees tokens alone, such as 'divprune'"
            )
        return own[0]
