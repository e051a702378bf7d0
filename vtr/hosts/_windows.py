"""What Swin and SAM share: a row of the engine is one attention window, and a clustered window of K x K tokens is a window of k x k."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtr.hosts._dense import DenseHost, Grid
from vtr.ops.windows import from_windows, to_windows
from vtr.types import Geometry, VtrError
from vtr.types.errors import WrongValue

Swaps = Iterable[tuple[Any, str, Any]]


@dataclass(frozen=True)
class WindowedHost(DenseHost):
    """A ViT whose blocks attend inside windows of K x K tokens, padded with zeros at the right and the bottom.

    Clustering goes by window, padding included; what is left is a grid of `ceil(rows / K) k` x `ceil(cols / K) k` tokens without padding.

    Args:
        window: side K of the windows.
        first, end: blocks between which tokens may be clustered: the first, and one past the last.
        halvings: how often the grid of the patches is halved, rounding up, in front of those blocks.
        flat: hidden states are `(B, rows*cols, D)` and the grid is the argument `input_dimensions`; else they are `(B, rows, cols, D)`.
        shrink: `(block, k) -> (owner, attribute, value) ...`, what makes a block's windows k x k.
    """

    window: int = 0
    first: int = 0
    end: int = 0
    halvings: int = 0
    flat: bool = False
    shrink: Callable[[Any, int], Swaps] = lambda block, side: ()

    def geometry(self) -> Geometry:
        """What methods see is one window."""
        side = self.window
        return replace(super().geometry(), feature_layer=self.end - 1, first_layer=self.first, patch_grid=(side, side), fixed_grid=True)

    def swaps(self, method: str, first: int, end: int, small: Grid | None) -> Swaps:
        """What makes the windows of `blocks[first:end]` smaller.

        Raises:
            ValueError: the smaller grid is not square.
            VtrError: the tokens left form no grid.
        """
        if small is None:
            raise VtrError(
                f"{method}: the attention windows of {self.name} have to know the grid left of each before they run, got a count of tokens; "
                "use 'pool' with grid=(k, k), or 'expedit'"
            )
        if small[0] != small[1]:
            raise WrongValue(
                f"{method}: grid must be square for the windows of {self.name}, {self.window} x {self.window}, got {small}; give (k, k)"
            )
        return [swap for block in self.blocks[first:end] for swap in self.shrink(block, small[0])]

    def row_grid(self, grid: Grid) -> Grid:
        return self.window, self.window

    def units(self, hidden: Tensor, run: Any) -> Tensor:
        if run.short:
            assert run.small is not None  # `swaps` refused others
            tokens = hidden.unflatten(1, (self._count(run.grid)[0] * run.small[0], -1)) if self.flat else hidden
            return to_windows(tokens, run.small[0])
        rows, cols = self._here(run.grid)
        if hidden.shape[1:-1] != ((rows * cols,) if self.flat else (rows, cols)):
            raise VtrError(f"{self.name}: a block should get a grid of {rows} x {cols} tokens, got {tuple(hidden.shape)}")
        return to_windows(hidden.unflatten(1, (rows, cols)) if self.flat else hidden, self.window)

    def hidden(self, units: Tensor, given: Tensor, run: Any, full: bool = False) -> Tensor:
        all_of_it = full or run.small is None
        hidden = from_windows(units, self._count(run.grid), self._here(run.grid) if all_of_it else None)
        return hidden.flatten(1, 2) if self.flat else hidden

    def arguments(self, run: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not self.flat:
            return args, kwargs
        rows, cols = (count * side for count, side in zip(self._count(run.grid), run.small, strict=True))
        return ((rows, cols), *args[1:]) if args else args, kwargs if args else {**kwargs, "input_dimensions": (rows, cols)}

    def _here(self, grid: Grid) -> Grid:
        """Token grid at the blocks that may be clustered, from that of the patches."""
        scale = 2**self.halvings  # rounding up once is rounding up every time
        return -(-grid[0] // scale), -(-grid[1] // scale)

    def _count(self, grid: Grid) -> Grid:
        rows, cols = self._here(grid)
        return -(-rows // self.window), -(-cols // self.window)


def smaller_bias(table: Tensor, window: int, side: int) -> Callable[[], Tensor]:
    """Swin's relative position bias of smaller windows.

    Args:
        table: `((2K-1)^2, H)`, of windows of K x K; read at every call.
        window: K; side: k.

    Returns:
        Function giving `(1, H, k*k, k*k)`: the table resized bilinearly per head, looked up for every query and key of a k x k window.
    """
    old, new = 2 * window - 1, 2 * side - 1
    at = torch.arange(side, device=table.device)
    apart = at[:, None] - at + side - 1
    entry = (apart[:, None, :, None] * new + apart[None, :, None, :]).flatten(2).flatten(0, 1)  # (k*k, k*k)

    def bias() -> Tensor:
        plane = table.mT.unflatten(1, (old, old))[None]
        if new != old:
            plane = F.interpolate(plane.float(), (new, new), mode="bilinear").to(table.dtype)
        return plane.flatten(2)[..., entry.to(table.device)]

    return bias
