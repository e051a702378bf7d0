"""One run of a dense ViT: which tokens are left, Views of them, and the way back to the full grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import to_device
from vtr.engine.llm.call import Clock
from vtr.engine.selections import check_counts, check_selection
from vtr.hosts._dense import DenseHost, Grid
from vtr.ops.gather import compaction, take
from vtr.ops.hashing import checksum
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import Selection, Signal, View, VtrError


class DenseRun:
    """State of one run. A row is what is clustered on its own: an image, or an attention window of one.

    Attributes:
        grid: token grid of the images; row_grid: of a row; small: of a short row, None where the tokens left form no grid.
        images, rows: how many; n: full tokens of a row.
        patch: `(G, K)` int64, original token that stands at each place; owner: `(G, n)` int64, place that holds each original token, -1 none.
        counts: tokens left of each row; real: `(G, K)` bool where rows differ, else None; checks: what steps with a budget kept, for the report.
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
        self.counts: list[int] = []
        self.real: Tensor | None = None
        self.checks: list[tuple[PlanStep, Tensor, list[int]]] = []
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
        self.counts = [self.n] * self.rows
        self.patch = torch.arange(self.n, device=tokens.device).expand(self.rows, -1)
        self.owner = self.patch
        self.sizes = torch.ones(self.rows, self.n, device=tokens.device)
        if any(hasattr(method, "seed") for method in self.plan.methods):
            self.checksum = checksum(self.pixels).repeat_interleave(self.rows // self.images)
        del self.pixels

    def view(self, item: PlanStep, tokens: Tensor, keeps: list[int]) -> View:
        """The View of rows `(G, K, D)` that are to keep so many tokens each."""
        device, rows = tokens.device, self.rows
        window = torch.arange(rows, device=device) % (rows // self.images)
        cells = torch.stack([window[:, None].expand_as(self.patch), self.patch // self.row_grid[1], self.patch % self.row_grid[1]], -1)
        prefix = self.host.prefix_tokens
        signals: dict[Signal, Any] = {s: self.keys[signal_layer(s, item.step)][:, :, prefix:].transpose(1, 2) for s in item.step.needs}
        return View(
            tokens=tokens,
            real=torch.ones(tokens.shape[:2], dtype=torch.bool, device=device) if self.real is None else self.real,
            keep=torch.full((rows,), keeps[0], device=device) if len(set(keeps)) == 1 else to_device(keeps, device),
            counts=list(self.counts),
            keeps=keeps,
            most=max(keeps),
            row=torch.arange(rows, device=device) // (rows // self.images),
            cells=cells,
            patch=self.patch,
            grids=[[self.row_grid] * (rows // self.images)] * rows,
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
        """Runs a merging step on rows `(G, K, D)`; returns them shorter, or themselves when there is nothing to do.

        Raises:
            ValueError: the answer does not fit the View.
            VtrError: it does not fit the budget, or this host cannot go on with what the step left.
        """
        keeps = self.plan.targets(item, [self.n] * self.rows, self.counts)
        if self.plan.counted(item) and keeps == self.counts:
            return tokens
        started = self.clock.start(tokens.device) if not torch.compiler.is_compiling() else None
        view = self.view(item, tokens, keeps)
        assert item.step.select is not None
        selection = item.step.select(view)
        if started is not None:
            self.clock.stop(started, tokens.device)
            check_selection(item.name, selection, view)  # looks at values, which a compiled run does not have
        return self._settle(item, view, selection, tokens)

    def _settle(self, item: PlanStep, view: View, selection: Selection, tokens: Tensor) -> Tensor:
        index, merged, real = self._chosen(item, view, selection, tokens)
        place = torch.arange(index.shape[1], device=index.device).expand_as(index)
        count = view.real.shape[1]
        target = index if real is None else torch.where(real, index, count)
        moved = torch.full((self.rows, count + 1), -1, device=index.device).scatter(1, target, place)[:, :-1]  # (G, N): new place, -1 none
        if selection.assign is not None:
            into = torch.where(view.real, selection.assign, -1)
            moved = torch.where(into >= 0, moved.gather(1, into.clamp_min(0)), -1)
            total = self.sizes.new_zeros(self.rows, count + 1).scatter_add(1, torch.where(into >= 0, into, count), self.sizes)
            self.sizes = total.gather(1, index)
        else:
            self.sizes = self.sizes.gather(1, index)
        self.owner = torch.where(self.owner >= 0, moved.gather(1, self.owner.clamp_min(0)), -1)
        self.patch = self.patch.gather(1, index)
        for name, value in view.per_token.items():
            self.per_token[item.method, name] = take(value, index)
        self.real = real
        self.small = selection.grid if real is None else None
        self.sized = self.sized or item.step.proportional
        self.short = True
        self._check_pruned(item)
        return merged.to(tokens.dtype)

    def _chosen(self, item: PlanStep, view: View, selection: Selection, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What stays: `index (G, K)` into the View, values `(G, K, D)`, and `real (G, K)` where rows keep different numbers, filled on the left.

        Tokens stay in position order, or as given where `order` says so or they form a grid.
        """
        asked = view.keeps if self.plan.counted(item) else None
        if selection.index is None:
            assert selection.keep is not None
            keep = selection.keep & view.real
            index, real = compaction(keep, None if asked is None else max(asked))
            counts = real.sum(1).tolist() if asked is None else asked
            if asked is not None:
                self._check_counts(item, keep.sum(1), asked)
            merged = take(tokens if selection.tokens is None else selection.tokens, index)
        else:
            index, filled = selection.index, selection.real
            places = torch.arange(index.shape[1], device=index.device).expand_as(index)
            as_given = selection.order == "given" or selection.grid is not None
            if filled is not None or not as_given:
                key = places if as_given else index
                order = (key if filled is None else key.masked_fill(~filled, -1)).argsort(dim=1, stable=True)
                index, places = index.gather(1, order), order
            real = torch.ones_like(index, dtype=torch.bool) if filled is None else filled.gather(1, places)
            counts = [index.shape[1]] * self.rows if filled is None else real.sum(1).tolist()
            if asked is not None and selection.grid is None:
                self._check_counts(item, torch.tensor(counts), asked)
            merged = take(tokens, index) if selection.tokens is None else take(selection.tokens, places)
            most = max(counts)
            index, real, merged = (t[:, t.shape[1] - most :] for t in (index, real, merged))
        self.counts = list(counts)
        if len(set(counts)) == 1:
            return index, merged, None
        if self.host.merge_point is None or self.host.merge_point.mask is None:
            raise VtrError(
                f"{item.name}: leaves {min(counts)} to {max(counts)} tokens of an image, and the blocks of {self.host.name!r} take no mask that "
                "could hide the difference; leave equally many"
            )
        return index, merged, real

    def _check_counts(self, item: PlanStep, kept: Tensor, asked: list[int]) -> None:
        """Notes how many tokens rows really keep; looks at once where that costs no sync, else `DenseReport` does."""
        if torch.compiler.is_compiling():
            return
        if kept.device.type == "cpu":
            check_counts([(item, kept, asked)])
        else:
            self.checks.append((item, kept, asked))

    def _check_pruned(self, item: PlanStep) -> None:
        restores = any(s.step.action == "restore" and s.step.select is not None for s in self.plan.steps)
        if restores or torch.compiler.is_compiling() or self.owner.device.type != "cpu":
            return  # elsewhere looking would cost a sync: such tokens come back as NaN
        if bool((self.owner < 0).any()):
            raise VtrError(
                f"{item.name}: prunes tokens without trace, but {self.host.name!r} needs its full token grid at the end; name a pivot for each "
                "in Selection.assign, or give a restoring step a select"
            )

    @property
    def masked(self) -> bool:
        """Whether attention needs `bias`."""
        return self.sized or self.real is not None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Additive mask of every key `(B, 1, 1, prefix + K)`: `log(size)` for proportional attention, the least number for filler."""
        bias = self.sizes.log().to(dtype) if self.sized else self.sizes.new_zeros(self.sizes.shape, dtype=dtype)
        if self.real is not None:
            bias = bias.masked_fill(~self.real, torch.finfo(dtype).min)
        return torch.nn.functional.pad(bias, (self.host.prefix_tokens, 0))[:, None, None]

    def lengthen(self, tokens: Tensor) -> Tensor:
        """Full rows `(G, n, D)` of short ones `(G, K, D)`: by the restoring step of the plan, else every token gets its pivot's value."""
        item = next((s for s in self.plan.steps if s.step.action == "restore"), None)
        if item is None or item.step.select is None:
            known = torch.nn.functional.pad(tokens, (0, 0, 0, 1), value=torch.nan)  # the last row is for tokens without a pivot
            return take(known, torch.where(self.owner >= 0, self.owner, tokens.shape[1]))
        started = self.clock.start(tokens.device) if not torch.compiler.is_compiling() else None
        full = item.step.select(self.view(item, tokens, [self.n] * self.rows))
        if started is not None:
            self.clock.stop(started, tokens.device)
        if not isinstance(full, Tensor) or full.shape[:2] != (self.rows, self.n):
            got = tuple(full.shape) if isinstance(full, Tensor) else type(full).__name__
            raise VtrError(
                f"{item.name}: a restoring step must return ({self.rows}, {self.n}, D), got {got}; return all tokens of the grid"
            )
        return full.to(tokens.dtype)
