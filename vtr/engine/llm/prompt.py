"""A prompt with visual tokens while it runs through the LLM: whose tokens they are, which text a method may read, and what is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import Images, count_views, to_device
from vtr.engine.llm.beside import Beside
from vtr.engine.llm.entry import Encoded, Entry
from vtr.engine.llm.placeholders import layouts_of, readable, rows_of_images
from vtr.engine.llm.positions import Positions
from vtr.engine.shrinking import Shrinking
from vtr.engine.signals import Tap, llm_signal, scaling_of, tower_signal
from vtr.engine.tokens import Places, Spots, Tokens
from vtr.engine.views import by_image, by_view, make_view, quotas
from vtr.hosts._host import Host
from vtr.hosts._layout import by_patch, numbered
from vtr.hosts._taps import TAPS, project_qkv
from vtr.ops.gather import take
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import Selection, Signal, Text, View, VtrError


class Prompt(Shrinking):
    """The prompt of one forward of the LLM; complete when it is made, but for what becomes shorter.

    Args:
        host, plan: the model, and what is done to it.
        entry: what the base model was given.
        visual, valid: `(B, q)` bool, visual tokens and real tokens of this call.
        facts: per row, counts on the host, from `count_rows`.
        positions: of the tokens of this call; followed through every removal.
        text_towers: source -> `TextTower`, for steps that ask for an embedding of the question.

    Attributes:
        text: `(B, q)` bool over original columns, real tokens that are not visual; `instruction`: those after the first visual
            token and between no two of one image.
        read: `(B, q)` bool, tokens that a method may read: the prompt, without guesses of a draft behind it and without labelled answers.
        text_width: most text tokens of a row; unpadded: no row has padding.
        line_of: `(B, q)` int64 over original columns, `image * lines + line` of a newline token, -1 otherwise.
        fixed: per row, tokens that are never removed (text and trailing padding).
        newlines: newline tokens left of each image; counts: visual tokens left of each image; view_counts: of each view, None = not known.
        events: `(layer, counts)` after every removal; the boundary is layer 0.
        frozen: layer -> hidden states and text rows, while that layer runs on text alone.
        probing: a projection of our own is running; taps look away.
        rope: rotary table of the layer in front of which a step runs.
        beside: features that the model would add behind its first layers.
        questions: question of every row, where a step asks for them.
        short: something was removed.

    Raises:
        VtrError: the placeholders of a row are not whole images.
    """

    def __init__(
        self,
        host: Host,
        plan: Plan,
        entry: Entry,
        visual: Tensor,
        valid: Tensor,
        facts: dict[str, Any],
        positions: Positions,
        text_towers: dict,
    ) -> None:
        super().__init__(plan)
        self.host, self.encoded, self.positions, self.text_towers = host, entry.encoded, positions, text_towers
        self.ids = entry.ids
        self.questions: list[str] | None = None  # read once, when the prompt is made
        self.fixed, self.text_width, self.unpadded = facts["fixed"], max(facts["text"]), facts["unpadded"]
        self.events: list[tuple[int, list[int]]] = []
        self.frozen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.probing = self.short = False
        self.rope: Any = None
        self.beside: Beside | None = None
        self._place(visual, valid, facts["visual"], entry)

        column = self.tokens.column
        self.text = valid & ~visual
        first = torch.where(visual, column, valid.shape[1]).amin(1, keepdim=True)
        self.read = readable(entry, self.text, valid, column, first)
        text = self.text & self.read
        after = text & (column > first) & ~self._inside()
        self.instruction = torch.where(after.any(1, keepdim=True), after, text)

    def _place(self, visual: Tensor, valid: Tensor, placeholders: list[int], entry: Entry) -> None:
        """Finds the image of every placeholder; `placeholders` are those of every row, newline tokens included."""
        device = valid.device
        layouts = layouts_of(self.host, self.encoded, placeholders)
        source, row, number, repeat = rows_of_images(placeholders, layouts)
        self.expand = max(entry.expand, repeat)
        known = self.encoded.images if self.encoded is not None else Images.of(layouts, device)
        images = known.select(source, row, number, device)
        self.counts = [layout.tokens for layout in images.layouts]
        self.view_counts: list[int] | None = [count for layout in images.layouts for count in layout.view_tokens]
        self.newlines = [layout.length - layout.tokens for layout in images.layouts]
        self.lines = max(int(layout.line.max()) + 1 for layout in images.layouts) or 1
        tables = torch.full((2, len(placeholders), max(placeholders)), -1)
        filled = [0] * len(placeholders)
        for image, layout in enumerate(images.layouts):  # host side: copies cached layouts into one table
            start, r = filled[row[image]], row[image]
            filled[r] = stop = start + layout.length
            tables[0, r, start:stop] = numbered(layout.patch, image, images.slots)
            tables[1, r, start:stop] = torch.where(layout.patch < 0, numbered(layout.line, image, self.lines), -1)
        tables = tables.to(device, non_blocking=True)
        rank = (visual.cumsum(1) - 1).clamp_min(0)
        gid_of, self.line_of = (torch.where(visual, t.gather(1, rank), -1) for t in tables)
        column = torch.arange(valid.shape[1], device=device).expand_as(valid)
        self.tokens = Tokens(column, valid, gid_of, images)

    def _inside(self) -> Tensor:
        """Returns the columns `(B, q)` between the first and the last token of one image, break tokens and marks of tiles among them."""
        gid, slots, count = self.tokens.gid_of, self.tokens.images.slots, len(self.tokens.images.layouts)
        image = gid // slots  # -1 where there is none
        before = image.cummax(1).values
        behind = torch.where(gid >= 0, image, count).flip(1).cummin(1).values.flip(1)
        return before == behind

    # ---- what stands around a step
    def counts_now(self, item: PlanStep) -> tuple[list[int], list[int]]:
        return [layout.tokens for layout in self.tokens.images.layouts], self.counts

    def look(self, item: PlanStep, hidden: Tensor, target: list[int]) -> tuple[View, Spots]:
        images = self.tokens.images
        if item.step.per == "view":
            groups, counts = by_view(images.layouts, images.slots), self._counts_of_views()
            keep = quotas(target, groups.owner, counts)
        else:
            groups, counts, keep = by_image(images.layouts, images.slots), self.counts, target
        spots = self.tokens.locate(groups, max(counts))
        view = make_view(hidden, spots, images, groups, list(counts), keep, item.method, item.step.layer)
        columns = _add_text(self, view, hidden)
        view.signals = _signals(self, item, view, groups.owner, spots.gid, columns, hidden)
        return view, spots

    def leave(self, item: PlanStep, view: View, selection: Selection, keep: Tensor) -> tuple[Tensor, int | None] | None:
        counts, known = None, self.plan.counted(item) and selection.grid is None
        by_views = item.step.per == "view"
        if known:
            counts = self._per_image(view.keeps) if by_views else view.keeps
        left = self._leave(item, keep, counts)
        if left is not None:
            self.view_counts = list(view.keeps) if known and by_views else None
        return left

    def _leave(self, item: PlanStep, keep: Tensor, counts: list[int] | None) -> tuple[Tensor, int] | None:
        """Applies the newline policy of a step to a keep mask, and lets leading padding go.

        Args:
            item: the step.
            keep: `(B, S)` bool, True stays.
            counts: visual tokens that will be left of each image, when the host knows; None asks the device (one sync).
        """
        keep, newlines = self._drop_newlines(keep, item.newlines)
        leading = self.tokens.valid.to(torch.uint8).cummax(1).values == 0
        keep = keep & ~leading
        if counts is None or newlines is None:
            counts, newlines = self._count(keep)
        if counts == self.counts and newlines == self.newlines:
            return None
        widths = list(self.fixed)
        for row, count, lines in zip(self.tokens.images.row, counts, newlines, strict=True):
            widths[row] += count + lines
        self.counts, self.newlines = counts, newlines
        return keep, max(widths)

    def removed(self, item: PlanStep, selection: Selection | None, index: Tensor, valid: Tensor) -> None:
        layer = item.step.layer if item.step.stage == "prefill" else 0
        self.positions.compact(index, valid, self.tokens.valid, layer, item.position_ids == "renumber")
        self.short = True
        self.events.append((layer, self.counts))

    def remove_pruned_patches(self, encoded: Encoded, embeds: Tensor) -> Tensor:
        """Removes the patches that the tower removed, whose rows of `embeds (B, S, D)` are NaN."""
        images, tokens = self.tokens.images, self.tokens
        assert encoded.kept is not None
        kept = encoded.kept.to(embeds.device).unflatten(0, (-1, images.slots))
        kept = kept[torch.tensor(images.source).to(embeds.device, non_blocking=True)].flatten()
        gid, valid = tokens.gid(), tokens.valid
        last = [s for s in self.plan.steps if s.in_tower][-1]
        left = self._leave(last, (gid < 0) | kept[gid.clamp_min(0)], [encoded.counts[s] for s in images.source])
        if left is not None:
            self.view_counts = None
            embeds, index = tokens.remove(embeds, *left)
            self.removed(last, None, index, valid)
        # left filler may be such a row; it is masked, but NaN would pass through a masked value
        filler = ~tokens.valid & (tokens.gid_of.gather(1, tokens.column) >= 0)
        return embeds.masked_fill(filler[..., None], 0.0)

    def _per_image(self, per_view: list[int]) -> list[int]:
        """Returns sums of a per-view list over the views of each image."""
        sums, ends = [], 0
        for layout in self.tokens.images.layouts:
            sums.append(sum(per_view[ends : ends + layout.views]))
            ends += layout.views
        return sums

    def _counts_of_views(self) -> list[int]:
        """Returns the visual tokens left of every view; asks the device where a removal by image came before."""
        if self.view_counts is None:
            gid = self.tokens.gid()
            self.view_counts = count_views(self.tokens.images, gid, gid >= 0)
        return self.view_counts

    def _drop_newlines(self, keep: Tensor, policy: str) -> tuple[Tensor, list[int] | None]:
        """Applies the newline policy to a keep mask; also returns how many newline tokens are left of each image, None when the host cannot
        know."""
        images, tokens = self.tokens.images, self.tokens
        if policy == "all" or not any(self.newlines):
            return keep, self.newlines
        line = torch.where(tokens.valid, self.line_of.gather(1, tokens.column), -1)
        if policy == "none":
            return keep & (line < 0), [0] * len(self.newlines)
        gid = tokens.gid()
        total = len(images.layouts) * self.lines
        lines = [numbered(layout.line, image, self.lines) for image, layout in enumerate(images.layouts)]
        closes = by_patch(images.layouts, lines, images.slots, -1)
        closed_by = closes.to(gid.device, non_blocking=True)[gid.clamp_min(0)]
        alive = torch.zeros(total + 1, dtype=torch.bool, device=gid.device)
        alive[torch.where((gid >= 0) & keep & (closed_by >= 0), closed_by, total).flatten()] = True
        return keep & ((line < 0) | alive[line.clamp_min(0)]), None

    def _count(self, keep: Tensor) -> tuple[list[int], list[int]]:
        """Counts the visual and newline tokens that a keep mask leaves of each image: the one host sync of a removal."""
        images, tokens = self.tokens.images, self.tokens
        count = len(images.layouts)
        gid = tokens.gid()
        line = torch.where(tokens.valid, self.line_of.gather(1, tokens.column), -1)
        owner = torch.where(gid >= 0, gid // images.slots, torch.where(line >= 0, line // self.lines + count, 2 * count))
        left = torch.zeros(2 * count + 1, dtype=torch.int64, device=gid.device)
        left.scatter_add_(0, torch.where(keep, owner, 2 * count).flatten(), torch.ones_like(owner).flatten())
        stats = left.tolist()
        return stats[:count], stats[count : 2 * count]


def _add_text(prompt: Prompt, view: View, hidden: Tensor) -> Tensor:
    """Fills `view.text` and `view.final_norm`; returns the original columns `(G, M)` of the text tokens."""
    text = prompt.text & prompt.read
    columns = (~text).to(torch.uint8).argsort(dim=1, stable=True)[:, : prompt.text_width][view.row]  # (G, M)
    real = text[view.row].gather(1, columns)
    spot = prompt.tokens.inverse()[view.row].gather(1, columns)
    view.text = Text(take(hidden[view.row], spot), real, prompt.instruction[view.row].gather(1, columns) & real)
    view.final_norm = prompt.host.language.norm
    return columns


def _signals(
    prompt: Prompt, item: PlanStep, view: View, owner: list[int], gid: Tensor, columns: Tensor, hidden: Tensor
) -> dict[Signal, Any]:
    """Returns everything that a step asked for, computed for its View.

    Args:
        prompt: the prompt in front of the step.
        item: the step.
        view: gets the factors on logits in `scaling`.
        owner: image of every row of the View.
        gid: `(G, N)` int64, global ids of its visual tokens; columns: `(G, M)`, original columns of its text tokens.
        hidden: `(B, S, D)`.
    """
    found: dict[Signal, Any] = {}
    visual = _columns_of(prompt.tokens, gid, len(prompt.tokens.images.alive))
    projected: Tap | None = None
    for signal in item.step.needs:
        if signal.kind == "text_embedding":
            found[signal] = prompt.text_towers[signal.source].embed(prompt.questions, view.row)
            continue
        if signal.tower:
            found[signal] = _of_tower(prompt, item, signal, view, owner, gid)
            continue
        if signal.kind.startswith("next_"):
            projected = projected or _projected(prompt, item.step.layer, hidden)
            tap = projected
        else:
            tap = _tap(prompt, item, signal)
        view.scaling = {**view.scaling, **scaling_of(signal, tap)}
        found[signal] = llm_signal(signal, _on(tap, hidden.device), visual, columns, view.row, prompt.read)
    return found


def _of_tower(prompt: Prompt, item: PlanStep, signal: Signal, view: View, owner: list[int], gid: Tensor) -> Any:
    """Returns a signal that was read while the tower ran."""
    encoded, layer, images = prompt.encoded, signal_layer(signal, item.step), prompt.tokens.images
    if encoded is None or layer not in encoded.taps:
        raise VtrError(f"{item.name}: needs {signal.kind} of the tower, but these features were encoded outside; pass pixel_values")
    source = to_device([images.source[image] for image in owner], gid.device)
    rows = encoded.rows.to(gid.device)[source]
    if item.step.per == "view":
        rows = rows.gather(1, view.cells[:, :1, 0])
    view.scaling = {**view.scaling, **scaling_of(signal, encoded.taps[layer])}
    theirs, total = source[:, None] * images.slots + gid % images.slots, len(encoded.images.alive)
    return tower_signal(signal, encoded.taps[layer], theirs, prompt.host.tower.prefix_tokens, total, rows)


def _projected(prompt: Prompt, layer: int, hidden: Tensor) -> Tap:
    """Returns q and k as layer `layer` will make them of `hidden (B, S, D)`, and the factor that its attention has on logits."""
    language = prompt.host.language
    block = language.blocks[layer]
    attention, factors = language.attention(block), []
    prompt.probing = True
    with TAPS.watching(attention, lambda *seen: factors.append(seen[-1])):
        made = project_qkv(attention, language.before_attention(block)(hidden), prompt.rope, **language.extra())
    prompt.probing = False
    return Tap(prompt.tokens.snapshot(), *made, factors[0])


def _tap(prompt: Prompt, item: PlanStep, signal: Signal) -> Tap:
    """Returns what was seen at the layer that a signal names.

    Raises:
        VtrError: that layer's attention cannot be read.
    """
    layer, language = signal_layer(signal, item.step), prompt.host.language
    if layer not in prompt.taps:
        raise VtrError(
            f"{item.name}: needs {signal.kind} of LLM layer {layer}, but its {type(language.attention(language.blocks[layer])).__name__} "
            "does not take its attention function from transformers' ALL_ATTENTION_FUNCTIONS, where it could be read; use another method"
        )
    return prompt.taps[layer]


def _columns_of(places: Places, gid: Tensor, total: int) -> Tensor:
    """Returns the original columns `(G, N)` of global ids, which are below `total`."""
    own = torch.where(places.gid_of >= 0, places.gid_of, total)
    table = torch.zeros(total + 1, dtype=torch.int64, device=gid.device)
    table.scatter_(0, own.flatten(), torch.arange(own.shape[1], device=gid.device).expand_as(own).flatten())
    return table[gid]


def _on(tap: Tap, device: torch.device) -> Tap:
    """Returns the tap on another device of a split model, or itself when it is there already."""
    if tap.places.column.device == device:
        return tap
    moved: dict[str, Any] = {n: v.to(device) for n, v in vars(tap).items() if isinstance(v, Tensor)}
    places = Places(*(t.to(device) for t in (tap.places.column, tap.places.valid, tap.places.gid_of)))
    blocks = {n: tuple(p.to(device) for p in b) if isinstance(b, tuple) else b.to(device) for n, b in tap.blocks.items()}
    return replace(tap, places=places, blocks=blocks, **moved)
