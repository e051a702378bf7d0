"""One run of a ViT without an LLM: its rows of tokens, and what stands around the steps that shorten them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import Images
from vtr.engine.restore import restored, spread
from vtr.engine.selections import check_counts
from vtr.engine.shrinking import Shrinking
from vtr.engine.tokens import Groups, Spots, Tokens
from vtr.engine.views import make_view
from vtr.hosts._dense import DenseHost
from vtr.hosts._layout import Grid, Layout
from vtr.ops.hashing import checksum
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import Selection, View, VtrError


class DenseRun(Shrinking):
    """State of one run. A row is what is clustered on its own: an image, or an attention window of one.

    Attributes:
        grid: token grid of the images; small: of a short row, None where the tokens left form no grid.
        images, rows: how many; n: full tokens of a row.
        counts: tokens left of each row.
        keys: layer -> keys of a merging block, `(B, heads, prefix + S, d)`.
        shown: blocks whose outputs are read, so that they must be full length.
        inside: the short hidden states behind such a block and the full ones shown outside.
        lengths: tokens of an image at the input of each block.
        trained: the block that runs may be asked for gradients.
        short: tokens are merged now, and not given back yet.
    """

    def __init__(self, host: DenseHost, plan: Plan, grid: Grid, pixels: Tensor, shown: frozenset[int]) -> None:
        super().__init__(plan)
        self.host, self.grid, self.shown = host, grid, shown
        self.images, self.pixels = len(pixels), pixels
        self.rows, self.n = 0, grid[0] * grid[1]
        self.small: Grid | None = None
        self.short = self.trained = False
        self.counts: list[int] = []
        self.keys: dict[int, Tensor] = {}
        self.inside: tuple[Tensor, Tensor] | None = None
        self.notes: dict[Any, Any] = {}
        self.lengths: list[int] = []

    def begin(self, tokens: Tensor, row_grid: Grid) -> None:
        """Makes the tables when the first rows `(R, n, D)` are seen."""
        self.rows, self.n = tokens.shape[:2]
        self.counts = [self.n] * self.rows
        device, count, windows = tokens.device, self.rows * self.n, self.rows // self.images
        ids, numbers = torch.arange(count, device=device), list(range(self.images))
        images = Images(
            [Layout((row_grid,) * windows, ids[: windows * self.n], ids[: windows * self.n])] * self.images,
            numbers,
            [0] * self.images,
            numbers,
            windows * self.n,
            torch.ones(count, dtype=torch.bool, device=device),
            torch.ones(count, device=device),
            assign=ids,
            whole=True,
            grid=row_grid,
        )
        if any(hasattr(method, "seed") for method in self.plan.methods):
            images.checksum = checksum(self.pixels)
        del self.pixels
        gid_of = ids.view(self.rows, self.n)
        columns = torch.arange(self.n, device=device).expand_as(gid_of)
        owner = [row // windows for row in range(self.rows)]
        self.groups = Groups(owner, [row * self.n for row in range(self.rows)], [self.n] * self.rows, rows=True)
        self.tokens = Tokens(columns, torch.ones_like(gid_of, dtype=torch.bool), gid_of, images, full=True)

    # ---- what stands around a step
    def counts_now(self, item: PlanStep) -> tuple[list[int], list[int]]:
        return [self.n] * self.rows, list(self.counts)

    def look(self, item: PlanStep, hidden: Tensor, target: list[int], among: list[int] | None = None) -> tuple[View, Spots]:
        spots = self.tokens.locate(self.groups, max(self.counts))
        view = make_view(hidden, spots, self.tokens.images, self.groups, list(self.counts), target, item.method, item.step.layer)
        for signal in item.step.needs:
            keys = self.keys[signal_layer(signal, item.step)][:, :, self.host.prefix_tokens :].transpose(1, 2)
            view.signals = {**view.signals, signal: keys if spots.whole else keys.flatten(0, 1)[spots.flat]}
        return view, spots

    def answered(self, selection: Selection) -> Selection:
        """Tokens that form a grid stay in its order."""
        if selection.grid is None:
            return selection
        return Selection(None, selection.index, selection.real, selection.tokens, selection.assign, "given", selection.grid)

    def leave(self, item: PlanStep, view: View, spots: Spots, selection: Selection, keep: Tensor) -> tuple[Tensor, int | None]:
        if not self.tokens.full:
            keep = keep & self.tokens.valid
        if self.plan.counted(item) and selection.grid is None:
            self.counts = list(view.keeps)
        elif selection.index is not None and selection.real is None:
            self.counts = [selection.index.shape[1]] * self.rows
        else:
            self.counts = keep.sum(1).tolist()
        most, least = max(self.counts), min(self.counts)
        if most > least and (self.host.merge_point is None or self.host.merge_point.mask is None):
            raise VtrError(
                f"{item.name}: leaves {least} to {most} tokens of an image, and the blocks of {self.host.name!r} take no mask that "
                "could hide the difference; leave equally many"
            )
        return keep, most

    def removed(self, item: PlanStep, selection: Selection, index: Tensor, valid: Tensor) -> None:
        self.tokens.full, self.short = len(set(self.counts)) == 1, True
        self.small = selection.grid if self.tokens.full else None
        if torch.compiler.is_compiling() or index.device.type != "cpu":  # elsewhere looking would cost a sync
            return  # the report compares the counts; tokens without a pivot come back as NaN
        self._check_now()
        restores = any(s.step.action == "restore" and s.step.select is not None for s in self.plan.steps)
        assign = self.tokens.images.assign
        if not restores and assign is not None and bool((assign < 0).any()):
            raise VtrError(
                f"{item.name}: prunes tokens without trace, but {self.host.name!r} needs its full token grid at the end; name a pivot for "
                "each in Selection.assign, or give a restoring step a select"
            )

    def _check_now(self) -> None:
        check_counts(self.checks)
        self.checks = []

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Returns the additive mask of every key `(B, 1, 1, prefix + K)`."""
        return self.bias(self.host.prefix_tokens, dtype)[:, None, None]

    def lengthen(self, tokens: Tensor) -> Tensor:
        """Returns full rows `(R, n, D)` of short ones `(R, K, D)`, by the restoring step of the plan if it has a `select`."""
        item = next((s for s in self.plan.steps if s.step.action == "restore"), None)
        if item is None or item.step.select is None:
            return spread(self, tokens)
        images, spots = self.tokens.images, self.tokens.in_place()
        full = [self.n] * self.rows
        view = make_view(tokens, spots, images, self.groups, list(self.counts), full, item.method, item.step.layer)
        return restored(self, item, view, self.tokens.gid_of.shape[1])
