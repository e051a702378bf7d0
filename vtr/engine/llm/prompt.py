"""A prompt with visual tokens while it runs through the LLM: whose tokens they are, which text a method may read, and what is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import Images, count_views, joined, to_device
from vtr.engine.llm.beside import Beside
from vtr.engine.llm.entry import Entry
from vtr.engine.llm.frame_scores import FrameScores, scores_of
from vtr.engine.llm.placeholders import layouts_of, readable, rows_of_images
from vtr.engine.llm.positions import Positions
from vtr.engine.shrinking import Shrinking
from vtr.engine.signals import Tap, llm_signal, scaling_of, tower_signal
from vtr.engine.tokens import Groups, Places, Spots, Tokens
from vtr.engine.views import groups_of, make_view, quotas
from vtr.hosts._layout import Kind, by_patch, numbered
from vtr.hosts._protocol import Host
from vtr.hosts._taps import TAPS, project_qkv
from vtr.ops.gather import take
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import Selection, Signal, Text, View, VtrError


class Prompt(Shrinking):
    """The prompt of one forward of the LLM; complete when it is made, but for what becomes shorter.

    Args:
        host, plan: the model, and what is done to it.
        entry: what the base model was given.
        visuals: by kind `(B, q)` bool, visual tokens of this call; valid: `(B, q)` bool, its real tokens.
        facts: per row, counts on the host, from `count_rows`.
        positions: of the tokens of this call; followed through every removal.
        text_towers: source -> `TextTower`, for steps that ask for an embedding of the question.

    Attributes:
        text: `(B, q)` bool over original columns, real tokens that are not visual; `instruction`: those after the first visual
            token and between no two of one image.
        read: `(B, q)` bool, tokens that a method may read: the prompt, without guesses of a draft behind it and without labelled answers;
            read_whole: these are all columns, as the host knows.
        text_width: most text tokens of a row; unpadded: no row has padding.
        line_of: `(B, q)` int64 over original columns, `image * lines + line` of a newline token, -1 otherwise.
        fixed: per row, tokens that are never removed (text and trailing padding).
        newlines: newline tokens left of each image; counts: visual tokens left of each image; view_counts: of each view, None = not known.
        events: `(layer, counts)` after every removal; the boundary is layer 0.
        frozen: layer -> hidden states and text rows, while that layer runs on text alone.
        probing: a projection of our own is running; taps look away.
        rope: rotary table of the layer in front of which a step runs.
        beside: features that the model would add behind its first layers.
        questions: question of every row, where a step asks for them; frame_scores: of videos.
        short: something was removed.
        attended: per new token `(G,)`, what steps at new tokens let it attend to, see `vtr.engine.llm.attend`.

    Raises:
        VtrError: the placeholders of a row are not whole images.
    """

    def __init__(
        self,
        host: Host,
        plan: Plan,
        entry: Entry,
        visuals: dict[Kind, Tensor],
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
        self.frame_scores: FrameScores | None = None
        self.beside: Beside | None = None
        self.attended: list[Tensor] = []
        self._place(visuals, valid, facts["visual"], entry)

        column, visual = self.tokens.column, torch.stack(list(visuals.values())).any(0)
        self.text = valid & ~visual
        first = torch.where(visual, column, valid.shape[1]).amin(1, keepdim=True)
        self.read = readable(entry, self.text, valid, column, first)
        self.read_whole = self.unpadded and entry.answers is None and (entry.prompt is None or entry.prompt >= valid.shape[1])
        text = self.text & self.read
        after = text & (column > first) & ~self._inside(visuals)
        self.instruction = torch.where(after.any(1, keepdim=True), after, text)

    def _place(self, visuals: dict[Kind, Tensor], valid: Tensor, placeholders: dict[Kind, list[int]], entry: Entry) -> None:
        """Finds the image or video of every placeholder; `placeholders` are by kind those of every row, newline tokens included."""
        device, parts, self.expand = valid.device, [], entry.expand
        for kind in visuals:
            layouts = layouts_of(self.host, kind, self.encoded.get(kind), placeholders[kind])
            source, row, number, repeat = rows_of_images(placeholders[kind], layouts)
            self.expand = max(self.expand, repeat)
            known = self.encoded[kind].images if kind in self.encoded else Images.of(layouts, device)
            parts.append(known.select(source, row, number, device))
        images = joined(parts)
        self.counts = [layout.tokens for layout in images.layouts]
        self.view_counts: list[int] | None = [count for layout in images.layouts for count in layout.view_tokens]
        self.newlines = [layout.length - layout.tokens for layout in images.layouts]
        self.lines = max(int(layout.line.max()) + 1 for layout in images.layouts) or 1
        gid_of, self.line_of = (torch.full(valid.shape, -1, device=device) for _ in range(2))
        for kind, visual in visuals.items():
            rank, tables = (visual.cumsum(1) - 1).clamp_min(0), self._spans(kind, images, placeholders[kind]).to(device, non_blocking=True)
            gid_of, self.line_of = (
                torch.where(visual, t.gather(1, rank), old) for t, old in zip(tables, (gid_of, self.line_of), strict=True)
            )
        column = torch.arange(valid.shape[1], device=device).expand_as(valid)
        self.tokens = Tokens(column, valid, gid_of, images, whole=self.unpadded)

    def _spans(self, kind: Kind, images: Images, placeholders: list[int]) -> Tensor:
        """Returns global ids and lines `(2, B, most)` of the placeholders of a kind, row by row."""
        tables = torch.full((2, len(placeholders), max(placeholders)), -1)
        filled = [0] * len(placeholders)
        for image, layout in enumerate(images.layouts):  # host side: copies cached layouts into one table
            if layout.kind != kind:
                continue
            start, r = filled[images.row[image]], images.row[image]
            filled[r] = stop = start + layout.length
            tables[0, r, start:stop] = numbered(layout.patch, image, images.slots)
            tables[1, r, start:stop] = torch.where(layout.patch < 0, numbered(layout.line, image, self.lines), -1)
        return tables

    def _inside(self, visuals: dict[Kind, Tensor]) -> Tensor:
        """Returns the columns `(B, q)` between the first and the last token of one image or video, break tokens, marks of tiles and times of
        frames among them."""
        gid, slots, count = self.tokens.gid_of, self.tokens.images.slots, len(self.tokens.images.layouts)
        inside = torch.zeros_like(gid, dtype=torch.bool)
        for visual in visuals.values():
            own = visual & (gid >= 0)
            image = torch.where(own, gid // slots, -1)
            before = image.cummax(1).values
            behind = torch.where(own, image, count).flip(1).cummin(1).values.flip(1)
            inside = inside | (before == behind)
        return inside

    # ---- what stands around a step
    def counts_now(self, item: PlanStep) -> tuple[list[int], list[int]]:
        return [layout.tokens for layout in self.tokens.images.layouts], self.counts

    def passes(self, item: PlanStep) -> list[list[int] | None]:
        kinds = [layout.kind for layout in self.tokens.images.layouts]
        found: list[list[int] | None] = []
        for kind in dict.fromkeys(kinds):
            pooling = self.host.pooling if kind == "video" else None
            here = not item.in_tower or (pooling is not None and pooling.behind_projector)
            if kind in item.step.on and here:
                found.append([i for i, own in enumerate(kinds) if own == kind])
        return found

    def look(self, item: PlanStep, hidden: Tensor, target: list[int], among: list[int] | None) -> tuple[View, Spots]:
        images = self.tokens.images
        groups = groups_of(item, images.layouts, images.slots, False, among)
        counts = self.counts_of(groups)
        keep = [target[i] for i in groups.owner] if groups.view is None else quotas(target, groups.owner, counts)
        spots = self.tokens.locate(groups, max(counts))
        spots.groups = groups
        view = make_view(hidden, spots, images, groups, counts, keep, item.method, item.step.layer)
        columns = _add_text(self, view, hidden)
        view.signals = _signals(self, item, view, groups, spots.gid, columns, hidden)
        return view, spots

    def leave(self, item: PlanStep, view: View, spots: Spots, selection: Selection, keep: Tensor) -> tuple[Tensor, int | None] | None:
        counts, views, groups = None, None, spots.groups
        assert groups is not None
        if self.plan.counted(item) and selection.grid is None:
            counts, views = list(self.counts), None if groups.view is None else list(self._counts_of_views())
            for image in groups.owner:
                counts[image] = 0
            for i, (image, stays) in enumerate(zip(groups.owner, view.keeps, strict=True)):
                counts[image] += stays
                if views is not None:
                    views[groups.number[i]] = stays
        left = self._leave(item, keep, counts)
        if left is not None:
            self.view_counts = views
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

    def remove_pruned_patches(self, embeds: Tensor) -> Tensor:
        """Removes the patches that the tower removed, whose rows of `embeds (B, S, D)` are NaN."""
        images, tokens, counts = self.tokens.images, self.tokens, list(self.counts)
        kept = images.alive.unflatten(0, (-1, images.slots)).clone()
        for kind, encoded in self.encoded.items():
            own = [i for i, layout in enumerate(images.layouts) if layout.kind == kind]
            if encoded.kept is None or not own:
                continue
            source = to_device([images.source[i] for i in own], embeds.device)
            theirs = encoded.kept.to(embeds.device).unflatten(0, (-1, encoded.images.slots))[source]
            kept[to_device(own, embeds.device)] = torch.nn.functional.pad(theirs, (0, images.slots - theirs.shape[1]))
            for i in own:
                counts[i] = encoded.counts[images.source[i]]
        gid, valid = tokens.gid(), tokens.valid
        last = [s for s in self.plan.steps if s.in_tower][-1]
        left = self._leave(last, (gid < 0) | kept.flatten()[gid.clamp_min(0)], counts)
        if left is not None:
            self.view_counts = None
            embeds, index = tokens.remove(embeds, *left)
            self.removed(last, None, index, valid)
        # left filler may be such a row; it is masked, but NaN would pass through a masked value
        filler = ~tokens.valid & (tokens.gid_of.gather(1, tokens.column) >= 0)
        return embeds.masked_fill(filler[..., None], 0.0)

    def scores_of_frames(self, groups: Groups, device: torch.device) -> Tensor:
        """Returns what the caller gave for the frames of videos `(G, T)` float32."""
        images = self.tokens.images
        videos = {images.source[i]: layout.views for i, layout in enumerate(images.layouts) if layout.kind == "video"}
        assert self.frame_scores is not None
        return scores_of(self.frame_scores, [videos[i] for i in sorted(videos)], [images.source[i] for i in groups.owner], device)

    def counts_of(self, groups: Groups) -> list[int]:
        """Returns the visual tokens left of images, or of views."""
        if groups.view is None:
            return [self.counts[image] for image in groups.owner]
        every = self._counts_of_views()
        return [every[number] for number in groups.number]

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


def _signals(prompt: Prompt, item: PlanStep, view: View, groups: Groups, gid: Tensor, columns: Tensor, hidden: Tensor) -> dict[Signal, Any]:
    """Returns everything that a step asked for, computed for its View.

    Args:
        prompt: the prompt in front of the step.
        item: the step.
        view: gets the factors on logits in `scaling`.
        groups: the rows of the View.
        gid: `(G, N)` int64, global ids of its visual tokens; columns: `(G, M)`, original columns of its text tokens.
        hidden: `(B, S, D)`.
    """
    found: dict[Signal, Any] = {}
    visual = _columns_of(prompt.tokens, gid, len(prompt.tokens.images.alive))
    projected: Tap | None = None
    in_turn = [prompt.tokens.images.row[image] for image in groups.owner] == list(range(len(hidden)))
    for signal in item.step.needs:
        if signal.kind == "text_embedding":
            found[signal] = prompt.text_towers[signal.source].embed(prompt.questions, view.row)
            continue
        if signal.kind == "frame_score":
            found[signal] = prompt.scores_of_frames(groups, hidden.device)
            continue
        if signal.tower:
            found[signal] = _of_tower(prompt, item, signal, view, groups, gid)
            continue
        if signal.kind.startswith("next_"):
            projected = projected or _projected(prompt, item.step.layer, hidden)
            tap = projected
        else:
            tap = _tap(prompt, item, signal)
        view.scaling = {**view.scaling, **scaling_of(signal, tap)}
        found[signal] = llm_signal(
            signal, _on(tap, hidden.device), visual, columns, view.row, None if prompt.read_whole else prompt.read, in_turn
        )
    return found


def _of_tower(prompt: Prompt, item: PlanStep, signal: Signal, view: View, groups: Groups, gid: Tensor) -> Any:
    """Returns a signal that was read while the tower ran."""
    layer, images = signal_layer(signal, item.step), prompt.tokens.images
    encoded = prompt.encoded.get(images.layouts[groups.owner[0]].kind)
    if encoded is None or layer not in encoded.taps:
        raise VtrError(f"{item.name}: needs {signal.kind} of the tower, but these features were encoded outside; pass pixel_values")
    source = to_device([images.source[image] for image in groups.owner], gid.device)
    rows = encoded.rows.to(gid.device)[source]
    if groups.view is not None:
        rows = rows.gather(1, to_device(groups.view, gid.device)[:, None])
    view.scaling = {**view.scaling, **scaling_of(signal, encoded.taps[layer])}
    theirs, total = source[:, None] * encoded.images.slots + gid % images.slots, len(encoded.images.alive)
    tap = _on(encoded.taps[layer], gid.device)
    return tower_signal(signal, tap, theirs.clamp_max(total - 1), prompt.host.tower.prefix_tokens, total, rows, encoded.pool)


def _projected(prompt: Prompt, layer: int, hidden: Tensor) -> Tap:
    """Returns q and k as layer `layer` will make them of `hidden (B, S, D)`, and the factor that its attention has on logits."""
    language = prompt.host.language
    block = language.blocks[layer]
    attention, factors = language.attention(block), []
    prompt.probing = True
    with TAPS.watching(attention, lambda *seen: factors.append(seen[-1])):
        extra = {**language.extra(), **prompt.host.position_ids(prompt.positions.at(layer).to(hidden.device))}
        made = project_qkv(attention, language.before_attention(block)(hidden), prompt.rope, **extra)
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
    places = Places(*(t.to(device) for t in (tap.places.column, tap.places.valid, tap.places.gid_of)), whole=tap.places.whole)
    blocks = {n: tuple(p.to(device) for p in b) if isinstance(b, tuple) else b.to(device) for n, b in tap.blocks.items()}
    return replace(tap, places=places, blocks=blocks, **moved)
