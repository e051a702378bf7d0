"""One run of the vision tower of a multimodal LLM: its rows of units, and what stands around the steps that shorten them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import Images, count_views, to_device
from vtr.engine.shrinking import Shrinking
from vtr.engine.signals import scaling_of, tower_signal
from vtr.engine.tokens import Groups, Places, Spots, Tokens
from vtr.engine.views import by_image, by_view, groups_of, make_view, quotas
from vtr.hosts._layout import Grid, Kind, Layout
from vtr.hosts._protocol import Host
from vtr.ops.hashing import checksum
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import Selection, View, VtrError
from vtr.types.errors import WrongValue


class Encoding(Shrinking):
    """State of one run of the tower. A row is one view, or all of them in a packed tower; its columns are units, prefix tokens excluded.

    Attributes:
        kind, shown: as what the model encodes these visuals, and as what methods see them.
        image, view: image and number of every view, on the host.
        alive: units of every view that will reach the LLM; there: units of every view in the tower.
        begun: the tower has seen its pixel values.
        short: something was removed.
        grids, pixels: of the views, while the input stage makes images smaller.
        arranged: the patches of every unit stand side by side (joined towers).
        cells: grids of clusters of the views, while a method that will restore them has put units together.
        borders, parts, segments, asked, followed: what a packed tower notes about its blocks and its attention.
    """

    def __init__(
        self, host: Host, plan: Plan, layouts: list[Layout], kind: Kind = "image", arguments: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(plan)
        self.host, self.layouts, self.kind, self.given = host, layouts, kind, arguments or {}
        self.pooling, self.shown = host.pooling if kind == "video" else None, host.shown(kind)
        self.image = [image for image, layout in enumerate(layouts) for _ in layout.grids]
        self.view = [view for layout in layouts for view in range(layout.views)]
        self.begun = self.short = self.arranged = False
        self.borders: dict[int, Tensor] = {}
        self.parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.segments: dict[int, tuple[Tensor, Tensor]] = {}
        self.asked: dict[int, int] = {}
        self.followed: dict[int, tuple[Any, Any]] = {}
        self.grids: list[Grid] | None = None
        self.cells: list[Grid] | None = None
        self.pixels: Tensor | None = None
        self._fill()

    def _fill(self) -> None:
        """Makes every view a full one, on the host."""
        self.alive = [count for layout in self.layouts for count in layout.view_tokens]
        self.areas = [area for layout in self.layouts for area in layout.areas]
        self.there = list(self.areas)
        self.short = False

    def start(self, pixels: Tensor) -> None:
        """Makes the tables once the pixel values are seen.

        Raises:
            ValueError: they are not those of the images.
        """
        tower, device = self.host.tower, pixels.device
        shares = [tower.pixel_rows(layout) for layout in self.layouts]
        if len(pixels) != sum(shares):
            what = f"{sum(shares)} {'views' if tower.by_views else 'patches'}"
            raise WrongValue(f"vtr: pixel_values must hold the {what} of the images, got {len(pixels)}; pass all outputs of the processor")
        images = Images.of(self.layouts, device)
        counts = torch.tensor(shares)
        owner = torch.arange(len(shares)).repeat_interleave(counts, output_size=sum(shares))
        place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        sums = self._checksums(pixels) * (2 * place + 1).to(device, non_blocking=True)
        total = torch.zeros(len(self.layouts), dtype=torch.int64, device=device)
        images.checksum = total.scatter_add_(0, owner.to(device, non_blocking=True), sums)
        gid_of = tower.start(self.kind, self.given, self.layouts, images.slots).to(device, non_blocking=True)
        self.tokens = self._all_of(gid_of, images)
        self.begun = True

    def _checksums(self, pixels: Tensor) -> Tensor:
        """Returns a number of every row of pixel values that does not depend on filler."""
        if not self.host.tower.padded:
            return checksum(pixels)
        sizes = [layout.image_size for layout in self.layouts]
        return torch.cat([checksum(own[None, ..., :h, :w]) for own, (h, w) in zip(pixels, sizes, strict=True)])

    def _all_of(self, gid_of: Tensor, images: Images) -> Tokens:
        """Returns full rows of units `(R, S)`."""
        columns = torch.arange(gid_of.shape[1], device=gid_of.device).expand_as(gid_of)
        return Tokens(columns, torch.ones_like(columns, dtype=torch.bool), gid_of, images, full=True, raster=not self.host.tower.by_views)

    def places(self) -> Places:
        """Returns where the patches are that the tower attends to; with pooling these are none of the tokens, and have ids of their own."""
        if self.pooling is None:
            return self.tokens.snapshot()
        device = self.tokens.column.device
        every = torch.arange(len(self.image) * self.host.tower.area, device=device).view(len(self.image), -1)
        return Places(torch.arange(every.shape[1], device=device).expand_as(every), torch.ones_like(every, dtype=torch.bool), every)

    def refill(self) -> None:
        """Makes every row a full one again, after a restoring step."""
        images = self.tokens.images
        images.assign, images.sizes = None, torch.ones_like(images.sizes)
        self.tokens = self._all_of(self.tokens.gid_of, images)
        self.cells = None
        self.followed.clear()
        self._fill()

    def _width(self) -> int:
        """Returns the units of the longest row."""
        return max(self.there) if self.host.tower.by_views else sum(self.there)

    @property
    def keys(self) -> Tensor | None:
        """Real tokens of every row `(V, S)` bool, None while every row is full."""
        return None if self.tokens.full else self.tokens.valid

    def per_image(self, per_view: list[int]) -> list[int]:
        """Returns sums of a per-view list over the views of each image."""
        sums = [0] * len(self.layouts)
        for image, value in zip(self.image, per_view, strict=True):
            sums[image] += value
        return sums

    def rows(self) -> Tensor:
        """Returns the tower row of each (image, view), on the CPU; the row of view 0 where an image has fewer views, or all are one row."""
        most = max(layout.views for layout in self.layouts)
        if not self.host.tower.by_views:
            return torch.zeros(len(self.layouts), most, dtype=torch.int64)
        starts = [self.image.index(i) for i in range(len(self.layouts))]
        return torch.tensor(
            [[s + (v if v < layout.views else 0) for v in range(most)] for s, layout in zip(starts, self.layouts, strict=True)]
        )

    def kept(self) -> Tensor | None:
        """Returns which global ids are still there, or None when all are."""
        if not self.short:
            return None
        gid, total = self.tokens.gid(), len(self.tokens.images.alive)
        kept = torch.zeros(total + 1, dtype=torch.bool, device=gid.device)
        kept[torch.where(gid >= 0, gid, total).flatten()] = True
        return kept[:-1] & self.tokens.images.alive

    # ---- what stands around a step
    def counts_now(self, item: PlanStep) -> tuple[list[int], list[int]]:
        return [layout.tokens for layout in self.layouts], self.per_image(self.alive)

    def passes(self, item: PlanStep) -> list[list[int] | None]:
        return [None] if self.shown in item.step.on else []

    def look(self, item: PlanStep, hidden: Tensor, target: list[int], among: list[int] | None) -> tuple[View, Spots]:
        if item.method in self.plan.restoring and self.short:
            rows, cols = self.layouts[0].grids[0]
            raise VtrError(
                f"{item.name}: needs the whole token grid of {rows} x {cols}, got {hidden.shape[1]} tokens; it must come before methods that "
                "remove tokens in the tower"
            )
        groups = groups_of(item, self.layouts, self.tokens.images.slots, self.host.tower.by_views)
        if groups.view is not None:
            counts, keep = self.alive, quotas(target, self.image, self.alive)
            spots = self.tokens.locate(groups, max(self.there))
        else:
            counts, keep = self.per_image(self.alive), target
            groups.rows = self.host.tower.by_views and len(groups.owner) == len(self.image)
            spots = self.tokens.locate(groups, max(self.per_image(self.there)))
        spots.groups = groups
        return self._view(item, hidden, groups, spots, counts, keep), spots

    def look_in_place(self, item: PlanStep, tokens: Tensor) -> View:
        """Returns the View of a restoring step: a row for every view, as they are where the rows of the tower are views."""
        groups, by_views = self._views(), self.host.tower.by_views
        spots = self.tokens.in_place() if by_views else self.tokens.locate(groups, max(self.there))
        return self._view(item, tokens, groups, spots, self.there, self.areas)

    def _views(self) -> Groups:
        return by_view(self.layouts, self.tokens.images.slots, rows=self.host.tower.by_views)

    def in_rows(self, views: Tensor) -> Tensor:
        """Returns the rows `(R, S, D)` of full views `(V, N, D)`, once every row is a full one."""
        if self.host.tower.by_views:
            return views
        spots = self.tokens.locate(self._views(), max(self.areas))
        rows = views.new_empty(self.tokens.column.numel() + 1, views.shape[-1])
        rows[torch.where(spots.present, spots.flat, len(rows) - 1)] = views
        return rows[None, :-1]

    def clusters(self) -> Iterator[tuple[Grid, Grid, Tensor, Tensor]]:
        """Yields for every view its grid, that of its clusters, and the columns of its units `(N,)` and places of its clusters `(K,)` int64."""
        assert self.cells is not None
        all_of_them, left = self._all_of(self.tokens.gid_of, self.tokens.images), self.tokens
        before, now = all_of_them.locate(self._views(), max(self.areas)).flat, left.locate(self._views(), max(self.there)).flat
        grids = [grid for layout in self.layouts for grid in layout.grids]
        for view, (grid, cells) in enumerate(zip(grids, self.cells, strict=True)):
            yield grid, cells, before[view, : self.areas[view]], now[view, : self.there[view]]

    def _view(self, item: PlanStep, hidden: Tensor, groups: Groups, spots: Spots, counts: list[int], keep: list[int]) -> View:
        images, needs = self.tokens.images, item.step.needs
        view = make_view(hidden, spots, images, groups, list(counts), keep, item.method, item.step.layer)
        if needs:
            rows = self.rows() if groups.view is None else torch.arange(len(groups.owner))[:, None]
            rows, total, prefix = rows.to(hidden.device), len(images.alive), self.host.tower.prefix_tokens
            pool = None if self.pooling is None else self.pooling.tokens
            taps = {signal: self.taps[signal_layer(signal, item.step)] for signal in needs}
            view.scaling = {s: factor for need in needs for s, factor in scaling_of(need, taps[need]).items()}
            view.signals = {s: tower_signal(s, taps[s], spots.gid, prefix, total, rows, pool) for s in needs}
        return view

    def leave(self, item: PlanStep, view: View, spots: Spots, selection: Selection, keep: Tensor) -> tuple[Tensor, int | None] | None:
        if item.method in self.plan.restoring:  # the full grid comes back, patches that unpadding cuts off included
            smaller = item.step.grid
            self.cells = None if smaller is None else [smaller(grid) for layout in self.layouts for grid in layout.grids]
            there = count_views(self.tokens.images, self.tokens.gid(), keep) if self.cells is None else [r * c for r, c in self.cells]
            self.there = there
            return keep, self._width()
        images, known = self.tokens.images, self.plan.counted(item) and selection.grid is None
        rows = [False] * len(self.image)
        if known and self.host.tower.by_views:  # a group that keeps all keeps its padding patches too: it runs as in the full model
            untouched = [k == n for k, n in zip(view.keeps, view.counts, strict=True)]
            by_views = spots.groups is not None and spots.groups.view is not None
            rows = untouched if by_views else [untouched[image] for image in self.image]
        gid = self.tokens.gid()
        alive = (gid >= 0) & images.alive[gid.clamp_min(0)]
        stays = keep & (alive | (gid >= 0) & to_device(rows, gid.device, torch.bool)[:, None]) if any(rows) else keep & alive
        if known and len(view.keeps) == len(self.image):
            self.alive = list(view.keeps)
        else:
            self.alive = count_views(images, gid, stays & alive)
        there, self.there = self.there, [t if same else a for t, same, a in zip(self.there, rows, self.alive, strict=True)]
        return (stays, self._width()) if self.there != there else None

    def removed(self, item: PlanStep, selection: Selection, index: Tensor, valid: Tensor) -> None:
        self.tokens.full = len(set(self.there)) == 1 or not self.host.tower.by_views
        self.short = True
        self.followed.clear()

    def answered(self, selection: Selection) -> Selection:
        """Keeps tokens of a packed tower where their positions and segments are; the LLM has them in its own order anyway."""
        return selection if self.host.tower.by_views else replace(selection, order="position")


def input_view(run: Encoding, item: PlanStep, pixels: Tensor) -> View | None:
    """Returns the View of a step at the pixel values: cells without tokens; None when it has nothing to do."""
    original, now = run.counts_now(item)
    target, slots = run.plan.targets(item, original, now), run.tokens.images.slots
    if target == now:
        return None
    groups = by_image(run.layouts, slots)
    spots = run.tokens.locate(groups, slots)
    spots.whole = False
    return make_view(pixels.new_zeros(*run.tokens.gid_of.shape, 0), spots, run.tokens.images, groups, now, target, item.method, 0)
