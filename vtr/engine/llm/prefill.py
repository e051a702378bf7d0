"""One call of the LLM with visual tokens: finding the images, running steps, shortening the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import to_device
from vtr.engine.llm.call import Call, Encoded
from vtr.engine.selections import check_selection, chosen_mask, limited, settle
from vtr.engine.signals import Tap, llm_signal, scaling_of, tower_signal
from vtr.engine.tokens import Sequence, locate
from vtr.engine.views import make_view, remember
from vtr.hosts._host import Host, by_patch, numbered
from vtr.hosts._taps import TAPS, project_qkv
from vtr.ops.gather import take
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import Text, View, VtrError


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
    chosen = chosen_mask(selection, view)
    if counted:
        chosen = limited(chosen & view.real, view.keep, item, target, call.checks)
    hidden, keep = settle(selection, chosen, view, located, images, hidden, sequence)
    return shorten(call, hidden, keep, target if counted else None, item)


def _add_text(host: Host, call: Call, view: View, hidden: Tensor) -> Tensor:
    """Fills `view.text` and `view.final_norm`; returns the original columns `(G, M)` of the text tokens."""
    assert call.text is not None and call.read is not None and call.instruction is not None and call.sequence is not None
    text = call.text & call.read
    columns = (~text).to(torch.uint8).argsort(dim=1, stable=True)[:, : call.text_width][view.row]  # (G, M)
    real = text[view.row].gather(1, columns)
    spot = call.sequence.inverse()[view.row].gather(1, columns)
    view.text = Text(take(hidden[view.row], spot), real, call.instruction[view.row].gather(1, columns) & real)
    view.final_norm = getattr(host.language_model, "norm", None)
    return columns


def _signals(host: Host, call: Call, item: PlanStep, view: View, gid: Tensor, columns: Tensor, hidden: Tensor, rope: Any) -> dict:
    """Everything `item` asked for, computed for this View."""
    found: dict = {}
    sequence, images = call.sequence, call.images
    assert sequence is not None and images is not None and view.text is not None and call.read is not None
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
            view.scaling = {**view.scaling, **scaling_of(signal, encoded.taps[layer])}
            found[signal] = tower_signal(
                signal, encoded.taps[layer], theirs, host.prefix_tokens, len(encoded.images.alive), encoded.rows.to(gid.device)[source]
            )
            continue
        if signal.kind.startswith("next_"):
            if projected is None:
                at = host.layers[item.step.layer]
                call.probing = True
                projected = Tap(sequence.snapshot(), *_project(getattr(at, host.llm_attention), getattr(at, host.llm_norm)(hidden), rope))
                call.probing = False
            tap = projected
        elif layer in call.taps:
            tap = call.taps[layer]
        else:
            raise VtrError(
                f"{item.name}: needs {signal.kind} of LLM layer {layer}, but its {type(getattr(host.layers[layer], host.llm_attention)).__name__} "
                "does not take its attention function from transformers' ALL_ATTENTION_FUNCTIONS, where it could be read; use another method"
            )
        view.scaling = {**view.scaling, **scaling_of(signal, tap)}
        found[signal] = llm_signal(signal, _on(tap, hidden.device), visual, columns, view.row, call.read)
    return found


def _project(attention: Any, normed: Tensor, rope: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v as `project_qkv` gives them, and the factor that `attention` has on its logits."""
    factors: list[float] = []
    with TAPS.watching(attention, lambda *seen: factors.append(seen[-1])):
        return *project_qkv(attention, normed, rope), factors[0]


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


def remove_pruned_patches(plan: Plan, call: Call, encoded: Encoded, embeds: Tensor) -> Tensor:
    """Removes the rows of patches that the tower removed, which are NaN, from `embeds (B, S, D)`."""
    images, sequence = call.images, call.sequence
    assert images is not None and sequence is not None and encoded.kept is not None
    kept = encoded.kept.to(embeds.device).unflatten(0, (-1, images.slots))
    kept = kept[torch.tensor(images.source).to(embeds.device, non_blocking=True)].flatten()
    gid = sequence.gid()
    last = [s for s in plan.steps if s.in_tower][-1]
    counts = [encoded.counts[s] for s in images.source]
    embeds = shorten(call, embeds, (gid < 0) | kept[gid.clamp_min(0)], counts, last)
    # left filler may be such a row; it is masked, but NaN would pass through a masked value
    filler = ~sequence.valid & (sequence.gid_of.gather(1, sequence.column) >= 0)
    return embeds.masked_fill(filler[..., None], 0.0)
