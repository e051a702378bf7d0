"""One run of a dense ViT: which tokens are left, Views of them, and the way back to the full grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.apply.call import Clock
from vtr.apply.plan import Plan, PlanStep, signal_layer
from vtr.apply.selections import check_selection
from vtr.hosts._dense import DenseHost, Grid
from vtr.ops.gather import compaction, take
from vtr.ops.hashing import checksum
from vtr.types import Selection, Signal, View, VtrError


class DenseRun:
    """State of one run. A row is what is clustered on its own: an image, or an attention window of one.

    Attributes:
        grid: token grid of the images; row_grid: of a row; small: of a short row, None where the tokens left form no grid.
        images, rows: how many; n: full tokens of a row.
        patch: `(G, K)` int64, original token that stands at each place; owner: `(G, n)` int64, place that holds each original token.
        sizes: `(G, K)` float32 original tokens that a token stands for; sized: they weigh in the attention.
        taps: blocks whose outputs must be full length.
        inside: the short hidden states behind a tapped block and the full ones shown outside; prefix: prefix tokens beside the rows.
        lengths: tokens of an image at the input of each block.
        trained: the block that runs may be asked for gradients.
    """

    def __init__(self, host: DenseHost, plan: Plan, grid: Grid, pixels: Tensor, taps: frozenset[int]) -> None:
        self.host, self.plan, self.grid, self.taps = host, plan, grid, taps
        self.images, self.pixels = len(pixels), pixels
        self.rows, self.n = 0, grid[0] * grid[1]
        self.row_grid: Grid = grid
        self.small: Grid | None = None
        self.short = False
        self.sized = False
        self.trained = False
        self.patch: Tensor
        self.owner: Tensor
        self.sizes: Tensor
        self.keys: dict[int, Tensor] = {}
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.inside: tuple[Tensor, Tensor] | None = None
        self.memory: dict[int, dict[str, Any]] = {}
        self.per_token: dict[tuple[int, str], Tensor] = {}
        self.notes: dict[Any, Any] = {}
        self.lengths: list[int] = []
        self.clock = Clock()
        self.checksum: Tensor | None = None

    def begin(self, tokens: Tensor, row_grid: Grid) -> None:
        """Makes the tables when the first rows `(G, n, D)` are seen."""
        self.rows, self.n = tokens.shape[:2]
        self.row_grid = row_grid
        self.patch = torch.arange(self.n, device=tokens.device).expand(self.rows, -1)
        self.owner = self.patch
        self.sizes = torch.ones(self.rows, self.n, device=tokens.device)
        if any(hasattr(method, "seed") for method in self.plan.methods):
            self.checksum = checksum(self.pixels).repeat_interleave(self.rows // self.images)
        del self.pixels

    def view(self, item: PlanStep, tokens: Tensor, keep: int) -> View:
        """The View of rows `(G, K, D)` that are to keep `keep` tokens each."""
        device, (rows, count) = tokens.device, tokens.shape[:2]
        window = torch.arange(rows, device=device) % (rows // self.images)
        cells = torch.stack([window[:, None].expand_as(self.patch), self.patch // self.row_grid[1], self.patch % self.row_grid[1]], -1)
        prefix = self.host.prefix_tokens
        signals: dict[Signal, Any] = {s: self.keys[signal_layer(s, item.step)][:, :, prefix:].transpose(1, 2) for s in item.step.needs}
        return View(
            tokens=tokens,
            real=torch.ones(rows, count, dtype=torch.bool, device=device),
            keep=torch.full((rows,), keep, device=device),
            counts=[count] * rows,
            keeps=[keep] * rows,
            most=keep,
            row=torch.arange(rows, device=device) // (rows // self.images),
            cells=cells,
            patch=self.patch,
            patch_grid=self.row_grid,
            crop_grids=[(0, 0)] * rows,
            image_sizes=[(0, 0)] * rows,
            sizes=self.sizes,
            checksum=self.checksum if self.checksum is not None else torch.zeros(rows, dtype=torch.int64, device=device),
            layer=item.step.layer,
            signals=signals,
            memory=self.memory.setdefault(item.method, {}),
            per_token={name: value for (method, name), value in self.per_token.items() if method == item.method},
        )

    def shorten(self, item: PlanStep, tokens: Tensor) -> Tensor:
        """Runs a merging step on rows `(G, K, D)`; returns them shorter, or themselves when there is nothing to do."""
        counted = self.plan.counted(item)
        count = tokens.shape[1]
        keep = self.plan.targets(item, [self.n], [count])[0]
        if counted and keep == count:
            return tokens
        started = self.clock.start(tokens.device) if not torch.compiler.is_compiling() else None
        view = self.view(item, tokens, keep)
        assert item.step.select is not None
        selection = item.step.select(view)
        if started is not None:
            self.clock.stop(started, tokens.device)
            check_selection(item.name, selection, view)  # looks at values, which a compiled run does not have
        return self._settle(item, view, selection, tokens, keep)

    def _settle(self, item: PlanStep, view: View, selection: Selection, tokens: Tensor, keep: int) -> Tensor:
        if selection.index is not None:
            index, merged = selection.index, selection.tokens if selection.tokens is not None else take(tokens, selection.index)
        else:
            assert selection.keep is not None
            index, _ = compaction(selection.keep, keep)
            merged = take(tokens if selection.tokens is None else selection.tokens, index)
        place = torch.arange(index.shape[1], device=index.device).expand_as(index)
        placed = torch.zeros_like(self.patch).scatter(1, index, place)
        if selection.assign is not None:
            self.owner = placed.gather(1, selection.assign.clamp_min(0).gather(1, self.owner))
            total = torch.zeros_like(self.sizes).scatter_add(1, selection.assign.clamp_min(0), self.sizes)
            self.sizes = total.gather(1, index)
        else:
            self.sizes = self.sizes.gather(1, index)
        self.patch = self.patch.gather(1, index)
        for name, value in view.per_token.items():
            self.per_token[item.method, name] = take(value, index)
        self.small = selection.grid
        self.sized = self.sized or item.step.proportional
        self.short = True
        return merged.to(tokens.dtype)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Proportional attention: `log(size)` of every key `(B, 1, 1, prefix + K)`."""
        bias = torch.nn.functional.pad(self.sizes.log(), (self.host.prefix_tokens, 0))
        return bias.to(dtype)[:, None, None]

    def lengthen(self, tokens: Tensor) -> Tensor:
        """Full rows `(G, n, D)` of short ones `(G, K, D)`: by the restoring step of the plan, else every token gets its pivot's value."""
        item = next((s for s in self.plan.steps if s.step.action == "restore"), None)
        if item is None or item.step.select is None:
            return take(tokens, self.owner)
        started = self.clock.start(tokens.device) if not torch.compiler.is_compiling() else None
        full = item.step.select(self.view(item, tokens, self.n))
        if started is not None:
            self.clock.stop(started, tokens.device)
        if not isinstance(full, Tensor) or full.shape[:2] != (self.rows, self.n):
            got = tuple(full.shape) if isinstance(full, Tensor) else type(full).__name__
            raise VtrError(
                f"{item.name}: a restoring step must return ({self.rows}, {self.n}, D), got {got}; return all tokens of the grid"
            )
        return full.to(tokens.dtype)
