"""One run of the tower: its rows of patches, and the steps that shorten them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import Images, to_device
from vtr.engine.llm.call import Clock
from vtr.engine.selections import check_selection, chosen_mask, limited, settle
from vtr.engine.signals import Tap, scaling_of, tower_signal
from vtr.engine.tokens import Located, Sequence, locate
from vtr.engine.views import make_view, remember
from vtr.hosts._host import Host, ImageLayout
from vtr.ops.gather import take
from vtr.ops.hashing import checksum
from vtr.ops.topk import quota
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import Selection, View


class Encoding:
    """State of one run of the tower. A row is one view; its columns are patches, prefix tokens excluded.

    Attributes:
        image, view: of every row, on the host.
        alive: tokens of every row that will reach the LLM; there: tokens of every row in the tower.
        keys: `(V, S)` bool of real tokens, None while every row is full.
        sized: merged tokens weigh by their size; short: something was removed.
    """

    def __init__(self, layouts: list[ImageLayout], area: int) -> None:
        self.layouts, self.area = layouts, area
        self.image = [i for i, layout in enumerate(layouts) for _ in range(layout.views)]
        self.view = [v for layout in layouts for v in range(layout.views)]
        self.alive = [n for layout in layouts for n in layout.view_tokens()]
        self.there = [area] * len(self.image)
        self.images: Images
        self.sequence: Sequence | None = None
        self.keys: Tensor | None = None
        self.sized = False
        self.short = False
        self.grids: list[tuple[int, int]] | None = None
        self.pixels: Tensor | None = None
        self.taps: dict[int, Tap] = {}
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.clock = Clock()
        self.checks: list[tuple[Any, Tensor, list[int]]] = []

    def start(self, pixels: Tensor) -> None:
        """Makes the tables once the pixel values `(V, 3, H, W)` are seen."""
        device = pixels.device
        self.images = Images.of(self.layouts, device)
        base = to_device([i * self.images.slots + v * self.area for i, v in zip(self.image, self.view, strict=True)], device)
        columns = torch.arange(self.area, device=device).expand(len(self.image), -1)
        self.sequence = Sequence(columns, torch.ones_like(columns, dtype=torch.bool), base[:, None] + columns)
        sums = checksum(pixels) * to_device([2 * v + 1 for v in self.view], device)
        total = torch.zeros(len(self.layouts), dtype=torch.int64, device=device)
        self.images.checksum = total.scatter_add_(0, to_device(self.image, device), sums)

    def by_image(self, per_row: list[int]) -> list[int]:
        """Sums of a per-row list over the views of each image."""
        sums = [0] * len(self.layouts)
        for image, value in zip(self.image, per_row, strict=True):
            sums[image] += value
        return sums

    def rows(self) -> Tensor:
        """Tower row of each (image, view), on the CPU; the row of view 0 where an image has fewer views."""
        most = max(layout.views for layout in self.layouts)
        starts = [self.image.index(i) for i in range(len(self.layouts))]
        return torch.tensor(
            [[s + (v if v < layout.views else 0) for v in range(most)] for s, layout in zip(starts, self.layouts, strict=True)]
        )

    def kept(self) -> Tensor | None:
        """Which global ids are still there, or None when all are."""
        if not self.short or self.sequence is None:
            return None
        gid, total = self.sequence.gid(), len(self.images.alive)
        kept = torch.zeros(total + 1, dtype=torch.bool, device=gid.device)
        kept[torch.where(gid >= 0, gid, total).flatten()] = True
        return kept[:-1] & self.images.alive

    def bias(self, prefix: int, dtype: torch.dtype) -> Tensor:
        """Additive bias `(V, prefix + S)` on the keys: log of the sizes of merged tokens, and the least number for filler."""
        assert self.sequence is not None
        gid = self.sequence.gid()
        bias = torch.zeros(gid.shape, dtype=dtype, device=gid.device)
        if self.sized:
            sizes = self.images.sizes[gid.clamp_min(0)].clamp_min(1)
            bias = bias + sizes.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)
        bias = bias.masked_fill(gid < 0, torch.finfo(dtype).min)
        return torch.nn.functional.pad(bias, (prefix, 0))


def run_tower_step(host: Host, plan: Plan, run: Encoding, item: PlanStep, hidden: Tensor, prefix: int) -> Tensor:
    """Runs one step on `hidden (V, prefix + S, D)`; returns it shorter, or itself when nothing is removed."""
    assert run.sequence is not None
    patches = hidden[:, prefix:]
    started = run.clock.start(hidden.device)
    made = _view(host, plan, run, item, patches)
    if made is None:
        return hidden
    view, located, keep = made
    assert item.step.select is not None
    selection = item.step.select(view)
    remember(view, located, run.images, item.method)
    run.clock.stop(started, hidden.device)
    if item.step.action == "observe":
        return hidden
    check_selection(item.name, selection, view)
    counted = plan.counted(item)
    chosen = chosen_mask(selection, view)
    if counted:
        chosen = limited(chosen & view.real, view.keep, item, keep, run.checks)
    return _shorten(run, item, hidden, prefix, view, located, keep if counted else None, selection, chosen)


def input_view(run: Encoding, item: PlanStep, plan: Plan, pixels: Tensor) -> View | None:
    """The View of a step at the pixel values: cells without tokens; None when it has nothing to do."""
    assert run.sequence is not None
    now = run.by_image(run.alive)
    target = plan.targets(item, [layout.tokens for layout in run.layouts], now)
    if target == now:
        return None
    located = locate(run.sequence, len(run.layouts), run.images.slots, run.images.slots)
    empty = pixels.new_zeros(len(run.image), run.area, 0)
    return make_view(empty, located, run.images, list(range(len(run.layouts))), now, target, item.method, 0)


def _view(host: Host, plan: Plan, run: Encoding, item: PlanStep, patches: Tensor) -> tuple[View, Located, list[int]] | None:
    """The View of a step and the tokens each of its rows is to keep; None when every image keeps all it has."""
    images, sequence, step = run.images, run.sequence, item.step
    assert sequence is not None
    now = run.by_image(run.alive)
    target = plan.targets(item, [layout.tokens for layout in run.layouts], now)
    if item.removes and plan.counted(item) and target == now:
        return None
    if step.per == "view":
        owner, counts = run.image, run.alive
        weights = torch.zeros(len(run.layouts), max(run.view) + 1, dtype=torch.int64)
        weights[run.image, run.view] = torch.tensor(run.alive)
        keep = quota(weights.double(), weights, torch.tensor(target))[run.image, run.view].tolist()
        located = locate(_row_groups(sequence, run.area), len(owner), run.area, max(run.there))
        located.gid = torch.where(located.present, sequence.gid().flatten()[located.flat], 0)
        rows = torch.arange(len(owner), device=patches.device)[:, None]
    else:
        owner, counts, keep = list(range(len(run.layouts))), now, target
        located = locate(sequence, len(owner), images.slots, max(run.by_image(run.there)))
        rows = run.rows().to(patches.device)
    view = make_view(patches, located, images, owner, list(counts), keep, item.method, step.layer)
    view.only = run.view if step.per == "view" else None
    total = len(images.alive)
    view.scaling = {s: f for need in step.needs for s, f in scaling_of(need, run.taps[signal_layer(need, step)]).items()}
    view.signals = {s: tower_signal(s, run.taps[signal_layer(s, step)], located.gid, host.prefix_tokens, total, rows) for s in step.needs}
    return view, located, keep


def row_view(host: Host, plan: Plan, run: Encoding, item: PlanStep, tokens: Tensor) -> View:
    """The View of full rows, one per view, with `tokens (V, K, D)` in their place (K tokens made of all of them, or all)."""
    made = _view(host, plan, run, item, tokens.new_zeros(len(tokens), run.area, 0))
    assert made is not None
    made[0].tokens = tokens
    return made[0]


def _row_groups(sequence: Sequence, area: int) -> Sequence:
    """The same rows with ids `row * area + patch`, so that every row is a group of its own."""
    ids = torch.arange(len(sequence.column), device=sequence.column.device)[:, None] * area
    return Sequence(sequence.column, sequence.valid, ids + torch.arange(area, device=ids.device))


def _shorten(
    run: Encoding,
    item: PlanStep,
    hidden: Tensor,
    prefix: int,
    view: View,
    located: Located,
    keep: list[int] | None,
    selection: Selection,
    chosen: Tensor,
) -> Tensor:
    """Applies a Selection to the rows of the tower; `keep` per View row where the host knows it."""
    images, sequence = run.images, run.sequence
    assert sequence is not None
    patches, stays = settle(selection, chosen, view, located, images, hidden[:, prefix:], sequence)
    gid = sequence.gid()
    alive = (gid >= 0) & images.alive[gid.clamp_min(0)]
    rows = [False] * len(run.image)
    if keep is not None:  # a group that keeps all its tokens keeps its padding patches too: it runs as in the full model
        untouched = [k == n for k, n in zip(keep, view.counts, strict=True)]
        rows = untouched if item.step.per == "view" else [untouched[i] for i in run.image]
    if any(rows):
        stays = stays & (alive | (gid >= 0) & to_device(rows, gid.device, torch.bool)[:, None])
    else:
        stays = stays & alive
    if keep is not None and len(keep) == len(run.image):
        run.alive = list(keep)
    else:
        run.alive = (stays & alive).sum(1).tolist()  # the one sync of this removal
    run.there = [t if same else a for t, same, a in zip(run.there, rows, run.alive, strict=True)]
    index, real = sequence.compact(stays, max(run.there))
    run.keys = real if len(set(run.there)) > 1 else None
    run.sized = run.sized or (item.step.action == "merge" and item.step.proportional)
    run.short = True
    return torch.cat([hidden[:, :prefix], take(patches, index)], 1)
