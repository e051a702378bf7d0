"""One call of the LLM with visual tokens: finding the images, running steps, shortening the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtr.apply.call import Call, Encoded
from vtr.apply.plan import Plan, PlanStep, signal_layer
from vtr.apply.sequence import Images, Sequence, check_selection, locate, make_view, remember, settle, to_device
from vtr.apply.signals import Tap, llm_signal, tower_signal
from vtr.hosts._host import Host, ImageLayout, by_patch, numbered
from vtr.hosts._taps import project_qkv
from vtr.ops.gather import take
from vtr.types import Text, View, VtrError


def begin(host: Host, call: Call, valid: Tensor, placeholders: list[int]) -> None:
    """Sets up the tokens of a call from its placeholders and what the tower left.

    Args:
        host: the model.
        call: with `visual (B, q)` known.
        valid: `(B, q)` bool, real tokens.
        placeholders: visual positions of every row, newline tokens included.

    Raises:
        VtrError: the placeholders of a row are not whole images.
    """
    device = valid.device
    visual = call.visual
    assert visual is not None
    layouts = _layouts(host, call.encoded, placeholders)
    source, row, number, repeat = _rows_of_images(placeholders, layouts)
    call.expand = max(call.expand, repeat)
    encoded = call.encoded.images if call.encoded is not None else Images.of(layouts, device)
    call.images = images = encoded.select(source, row, number, device)
    call.counts = [layout.tokens for layout in images.layouts]
    call.newlines = [layout.length - layout.tokens for layout in images.layouts]
    call.lines = max(int(layout.line.max()) + 1 for layout in images.layouts) or 1
    tables = torch.full((2, len(placeholders), max(placeholders)), -1)
    filled = [0] * len(placeholders)
    for image, layout in enumerate(images.layouts):  # host side: copies cached layouts into one table
        start, r = filled[row[image]], row[image]
        filled[r] = stop = start + layout.length
        tables[0, r, start:stop] = numbered(layout.patch, image, images.slots)
        tables[1, r, start:stop] = torch.where(layout.patch < 0, numbered(layout.line, image, call.lines), -1)
    tables = tables.to(device, non_blocking=True)
    rank = (visual.cumsum(1) - 1).clamp_min(0)
    gid_of, call.line_of = (torch.where(visual, t.gather(1, rank), -1) for t in tables)
    column = torch.arange(valid.shape[1], device=device).expand_as(valid)
    call.sequence = Sequence(column, valid, gid_of)
    call.text = valid & ~visual
    first = torch.where(visual, column, valid.shape[1]).amin(1, keepdim=True)
    after = call.text & (column > first)
    call.instruction = torch.where(after.any(1, keepdim=True), after, call.text)


def _layouts(host: Host, encoded: Encoded | None, placeholders: list[int]) -> list[ImageLayout]:
    if encoded is not None:
        return encoded.images.layouts
    if host.default_layout is None:
        raise VtrError(
            f"{host.name}: the image sizes of these features are unknown; pass pixel_values, or encode the images inside the reduction"
        )
    if any(count % host.default_layout.length for count in placeholders):
        raise VtrError(_mismatch(placeholders, [host.default_layout.length]))
    return [host.default_layout] * (sum(placeholders) // host.default_layout.length)


def _rows_of_images(placeholders: list[int], layouts: list[ImageLayout]) -> tuple[list[int], list[int], list[int], int]:
    """Source image, prompt row and number in the row of every image the LLM sees, and how often rows repeat (beams)."""
    lengths = [layout.length for layout in layouts]
    repeat = sum(placeholders) // max(sum(lengths), 1)
    rows = placeholders[::repeat] if repeat else []
    if not repeat or [p for p in rows for _ in range(repeat)] != placeholders:
        raise VtrError(_mismatch(placeholders, lengths))
    source: list[int] = []
    row: list[int] = []
    number: list[int] = []
    image = 0
    for r, wanted in enumerate(rows):
        first, got = image, 0
        while got < wanted and image < len(lengths):
            got += lengths[image]
            image += 1
        if got != wanted:
            raise VtrError(_mismatch(placeholders, lengths))
        for beam in range(repeat):
            source += range(first, image)
            row += [r * repeat + beam] * (image - first)
            number += range(image - first)
    if image != len(lengths):
        raise VtrError(_mismatch(placeholders, lengths))
    return source, row, number, repeat


def _mismatch(placeholders: list[int], lengths: list[int]) -> str:
    return (
        f"vtr: rows must hold whole images in order, got rows with {placeholders} placeholders for images of {lengths} tokens; pass every image "
        "of the prompt once, and no prefill_chunk_size (a chunk would see part of an image)"
    )


def run_step(host: Host, plan: Plan, call: Call, item: PlanStep, hidden: Tensor, rope: Any = None, text_towers: Any = None) -> Tensor:
    """Runs one step at this point of the LLM: builds the View, asks the method, removes what it says. Returns the hidden states.

    Args:
        host, plan, call: the model, what is done to it, and this forward.
        item: the step.
        hidden: `(B, S, D)` in front of the boundary or of the step's layer.
        rope: the rotary table of that layer, for `next_q` and `next_k`.
        text_towers: source -> `TextTower`, for `text_embedding`.
    """
    images, sequence, step = call.images, call.sequence, item.step
    assert images is not None and sequence is not None
    target = plan.targets(item, [layout.tokens for layout in images.layouts], call.counts)
    counted = plan.counted(item)
    if not any(call.counts) or (item.removes and counted and target == call.counts):
        return hidden
    device = hidden.device
    started = call.clock.start(device)
    located = locate(sequence, len(images.layouts), images.slots, max(call.counts))
    view = make_view(hidden, located, images, list(range(len(images.layouts))), call.counts, target, item.method, step.layer)
    text_columns = _add_text(host, call, view, hidden)
    asked = {n: text_towers[n.source].embed(call.questions, view.row) for n in step.needs if n.kind == "text_embedding"}
    view.signals = _signals(host, call, item, view, located.gid, text_columns, hidden, rope) | asked
    assert step.select is not None
    selection = step.select(view)
    call.clock.stop(started, device)
    remember(view, located, images, item.method)
    if step.action == "observe":
        return hidden
    check_selection(item.name, selection, view)
    hidden, keep = settle(selection, view, located, images, hidden, sequence)
    return shorten(call, hidden, keep, target if counted else None, item)


def _add_text(host: Host, call: Call, view: View, hidden: Tensor) -> Tensor:
    """Fills `view.text` and `view.final_norm`; returns the original columns `(G, M)` of the text tokens."""
    assert call.text is not None and call.instruction is not None and call.sequence is not None
    columns = (~call.text).to(torch.uint8).argsort(dim=1, stable=True)[:, : call.text_width][view.row]  # (G, M)
    real = call.text[view.row].gather(1, columns)
    spot = call.sequence.inverse()[view.row].gather(1, columns)
    view.text = Text(take(hidden[view.row], spot), real, call.instruction[view.row].gather(1, columns) & real)
    view.final_norm = getattr(host.language_model, "norm", None)
    return columns


def _signals(host: Host, call: Call, item: PlanStep, view: View, gid: Tensor, columns: Tensor, hidden: Tensor, rope: Any) -> dict:
    """Everything `item` asked for, computed for this View."""
    found: dict = {}
    sequence, images = call.sequence, call.images
    assert sequence is not None and images is not None and view.text is not None
    visual = _columns_of(sequence, gid, len(images.alive))
    projected: Tap | None = None
    for signal in (n for n in item.step.needs if n.kind != "text_embedding"):
        layer = signal_layer(signal, item.step)
        if signal.tower:
            if call.encoded is None or layer not in call.encoded.taps:
                raise VtrError(f"{item.name}: needs {signal.kind} of the tower, but these features were encoded outside; pass pixel_values")
            encoded = call.encoded
            source = to_device(images.source, gid.device)
            theirs = source[:, None] * images.slots + gid % images.slots
            found[signal] = tower_signal(
                signal, encoded.taps[layer], theirs, host.prefix_tokens, len(encoded.images.alive), encoded.rows.to(gid.device)[source]
            )
            continue
        if signal.kind.startswith("next_"):
            if projected is None:
                at = host.layers[item.step.layer]
                call.probing = True
                query, key, value = project_qkv(getattr(at, host.llm_attention), getattr(at, host.llm_norm)(hidden), rope)
                call.probing = False
                projected = Tap(sequence.snapshot(), query, key, value)
            tap = projected
        elif layer in call.taps:
            tap = call.taps[layer]
        else:
            raise VtrError(
                f"{item.name}: needs {signal.kind} of LLM layer {layer}, but its {type(getattr(host.layers[layer], host.llm_attention)).__name__} "
                "does not take its attention function from transformers' ALL_ATTENTION_FUNCTIONS, where it could be read; use another method"
            )
        found[signal] = llm_signal(signal, _on(tap, hidden.device), visual, columns, view.row, view.text.real)
    return found


def _columns_of(sequence: Sequence, gid: Tensor, total: int) -> Tensor:
    """Original columns `(G, N)` of global ids."""
    own = torch.where(sequence.gid_of >= 0, sequence.gid_of, total)
    table = torch.zeros(total + 1, dtype=torch.int64, device=gid.device)
    table.scatter_(0, own.flatten(), torch.arange(own.shape[1], device=gid.device).expand_as(own).flatten())
    return table[gid]


def _on(tap: Tap, device: torch.device) -> Tap:
    """The tap on another device of a split model; nothing happens when it is there already."""
    if tap.sequence.column.device == device:
        return tap
    moved: dict[str, Any] = {n: v.to(device) for n, v in vars(tap).items() if isinstance(v, Tensor)}
    sequence = Sequence(*(t.to(device) for t in (tap.sequence.column, tap.sequence.valid, tap.sequence.gid_of)))
    blocks = {n: tuple(p.to(device) for p in b) if isinstance(b, tuple) else b.to(device) for n, b in tap.blocks.items()}
    return replace(tap, sequence=sequence, blocks=blocks, **moved)


def shorten(call: Call, hidden: Tensor, keep: Tensor, counts: list[int] | None, item: PlanStep) -> Tensor:
    """Removes what `keep (B, S)` says from the sequence of a call, with the newline tokens that the policy drops and leading padding.

    Args:
        call: its sequence, positions and counts are updated.
        hidden: `(B, S, D)`.
        keep: True stays.
        counts: visual tokens that will be left of each image, when the host knows; None asks the device (one sync).
        item: the step this is for: layer, newline policy and positions option.

    Returns:
        The shorter hidden states; `hidden` itself when nothing is removed.
    """
    sequence, images, positions = call.sequence, call.images, call.positions
    assert sequence is not None and images is not None and positions is not None
    keep, newlines = _drop_newlines(call, keep, item.newlines)
    leading = sequence.valid.to(torch.uint8).cummax(1).values == 0
    keep = keep & ~leading
    if counts is None or newlines is None:
        counts, newlines = _count(call, keep)
    widths = list(call.fixed)
    for image, (count, lines) in enumerate(zip(counts, newlines, strict=True)):
        widths[images.row[image]] += count + lines
    width = max(widths)
    if counts == call.counts and newlines == call.newlines:
        return hidden
    layer = item.step.layer if item.step.stage == "prefill" else 0
    valid_before = sequence.valid
    index, _ = sequence.compact(keep, width)
    positions.compact(index, valid_before, sequence.valid, layer, item.position_ids == "renumber")
    call.counts, call.newlines, call.reduced = counts, newlines, True
    call.events.append((layer, counts))
    return take(hidden, index)


def _drop_newlines(call: Call, keep: Tensor, policy: str) -> tuple[Tensor, list[int] | None]:
    """Applies the newline policy to a keep mask; also how many newline tokens are left of each image, None when the host cannot know."""
    images, sequence = call.images, call.sequence
    assert images is not None and sequence is not None and call.line_of is not None
    if policy == "all" or not any(call.newlines):
        return keep, call.newlines
    line = torch.where(sequence.valid, call.line_of.gather(1, sequence.column), -1)
    if policy == "none":
        return keep & (line < 0), [0] * len(call.newlines)
    gid = sequence.gid()
    total = len(images.layouts) * call.lines
    lines = [numbered(layout.line, image, call.lines) for image, layout in enumerate(images.layouts)]
    closes = by_patch(images.layouts, lines, images.slots, -1)
    closed_by = closes.to(gid.device, non_blocking=True)[gid.clamp_min(0)]
    alive = torch.zeros(total + 1, dtype=torch.bool, device=gid.device)
    alive[torch.where((gid >= 0) & keep & (closed_by >= 0), closed_by, total).flatten()] = True
    return keep & ((line < 0) | alive[line.clamp_min(0)]), None


def _count(call: Call, keep: Tensor) -> tuple[list[int], list[int]]:
    """Visual and newline tokens that a keep mask leaves of each image: the one host sync of a removal."""
    images, sequence = call.images, call.sequence
    assert images is not None and sequence is not None and call.line_of is not None
    count = len(images.layouts)
    gid = sequence.gid()
    line = torch.where(sequence.valid, call.line_of.gather(1, sequence.column), -1)
    owner = torch.where(gid >= 0, gid // images.slots, torch.where(line >= 0, line // call.lines + count, 2 * count))
    left = torch.zeros(2 * count + 1, dtype=torch.int64, device=gid.device)
    left.scatter_add_(0, torch.where(keep, owner, 2 * count).flatten(), torch.ones_like(owner).flatten())
    stats = left.tolist()
    return stats[:count], stats[count : 2 * count]
