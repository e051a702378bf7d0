"""What a reduced model must compute, by the unmodified model at full length with explicit masks. Uses nothing of vtr's engine and hosts.

A token that is gone from layer k on is hidden from every other token's attention from layer k on. A merged token is overwritten by the
mean of what it stands for, a frozen one by its own input. Keys are hidden through the attention function that transformers hands to each
layer, so that layers without a mask argument work too; the rest by plain hooks on single layers. All of it is undone at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from vtr.testing.cut import cut_logits
from vtr.testing.families import Clip, Family, Shot
from vtr.testing.tiny_models import FAMILIES, Batch, packing


@dataclass
class Expected:
    """What happened to the tokens of a batch; build it with the functions below, in model order.

    Args:
        drops: (LLM layer, `(B, S)` bool kept from the input of that layer on).
        merges: (LLM layer, `(B, S)` int64 position each token is averaged into at the input of that layer).
        positions: (LLM layer, `(B, S)` int64 rotary positions from that layer on).
        values: (LLM layer, `(B, S)` bool, `(B, S, D)`), values that replace those of tokens at the input of that layer.
        unseen: `(B, S, S)` bool, keys that a query does not see in LLM layers from `unseen_from` on, by query and key; None = none.
        freeze: LLM layers in which placeholders keep their values.
        tower_drops: (tower layer, `(U, P)` bool what is kept from the input of that layer on); U views, P is what becomes one token each.
        tower_merges: (tower layer, `(U, P)` int64 what each is averaged into between that layer's attention and MLP).
        tower_values: what merges leave whose values are given, see `TowerValues`.
        proportional: whether a key weighs log(size) after a tower merge.
    """

    drops: list[tuple[int, Tensor]] = field(default_factory=list)
    merges: list[tuple[int, Tensor]] = field(default_factory=list)
    positions: list[tuple[int, Tensor]] = field(default_factory=list)
    values: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    unseen: Tensor | None = None
    unseen_from: int = 0
    freeze: tuple[int, ...] = ()
    tower_drops: list[tuple[int, Tensor]] = field(default_factory=list)
    tower_merges: list[tuple[int, Tensor]] = field(default_factory=list)
    tower_values: list[TowerValues] = field(default_factory=list)
    proportional: bool = True


@dataclass(frozen=True)
class TowerValues:
    """A merge in the tower with given values, `(U, P)` patches of U tower inputs.

    Args:
        layer: tower layer.
        before_mlp: whether it is between the layer's attention and MLP, or at the layer's input.
        keep: `(U, P)` bool, patches that are left.
        into: `(U, P)` int64, patch that each patch is merged into, itself where it stays, -1 where it is pruned.
        values: `(U, P, D)`, values of the patches that are left.
    """

    layer: int
    before_mlp: bool
    keep: Tensor
    into: Tensor
    values: Tensor


@torch.no_grad()
def masked_logits(model: Any, batch: Batch, expected: Expected) -> Tensor:
    """Returns the logits `(B, S, V)` of the full-length model in which what `expected` says is hidden, averaged or frozen."""
    family = FAMILIES[batch.kind]
    with ExitStack() as stack:
        if family.cut:
            stack.enter_context(keys_hidden(_in_tower(stack, family, model, batch, expected)))
            return cut_logits(model, family.language(model), batch.inputs, batch.positions, expected)
        masks: dict[nn.Module, Any] = _in_llm(stack, family, family.language(model), batch, expected)
        masks.update(_in_tower(stack, family, model, batch, expected))
        stack.enter_context(keys_hidden(masks))
        return model(**batch.inputs, position_ids=batch.positions, use_cache=False).logits


@contextmanager
def keys_hidden(masks: Mapping[nn.Module, Tensor | list[Tensor]]) -> Iterator[None]:
    """Hides keys inside the block: the attention of a layer, or of a module in it, gets the mask of the layer and no other.

    Args:
        masks: layer -> mask `(B, 1, S, S)` or wider: bool, True where a key is seen, or float, what is added to the logits; several for a
            layer that calls its attention several times, in order.

    Raises:
        AssertionError: the attention of a layer did not ask transformers for its function, so that nothing was hidden from it.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    layer_of = {module: layer for layer in masks for module in layer.modules()}
    calls = {layer: cycle(mask if isinstance(mask, list) else [mask]) for layer, mask in masks.items()}
    met: set[nn.Module] = set()
    plain = registry.get_interface

    def get_interface(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = plain(name, default)

        def masked(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            layer = layer_of.get(module)
            if layer is not None:
                met.add(layer)
                attention_mask = next(calls[layer])
                if name == "eager" and attention_mask.dtype == torch.bool:
                    attention_mask = additive(attention_mask, query)
            return attend(module, query, key, value, attention_mask, *args, **kwargs)

        return masked

    registry.get_interface = get_interface  # type: ignore[method-assign]
    try:
        yield
    finally:
        del registry.get_interface
    unmet = [type(layer).__name__ for layer in masks if layer not in met]
    assert not unmet, f"keys_hidden: {', '.join(sorted(set(unmet)))} did not ask transformers for its attention function: nothing is hidden"


def _in_llm(stack: ExitStack, family: Family, language: Any, batch: Batch, expected: Expected) -> dict[nn.Module, Tensor]:
    """Hooks the LLM's layers until `stack` is closed; returns their masks."""
    visible, visual = batch.valid, batch.visual
    length = visible.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    diagonal = torch.eye(length, dtype=torch.bool)
    sizes = torch.ones(visible.shape, dtype=language.dtype)
    positions: Tensor | None = None
    masks = {}
    for number, layer in enumerate(language.layers):
        averages = []
        for at, into in expected.merges:
            if at == number:
                averages.append((into, sizes))
                sizes = torch.zeros_like(sizes).scatter_add(1, into, sizes)
                visible = visible & (into == torch.arange(length))
        for at, keep in expected.drops:
            visible = visible & keep if at == number else visible
        for at, wanted in expected.positions:
            positions = wanted if at == number else positions
        kinds: Any = getattr(language.config, "layer_types", None)
        together = family.together(visual, kinds[number] if kinds else "full_attention")
        near = (distance < (window_of(language.config, number) or length))[None]
        seen = (distance >= 0)[None] & near
        if together is not None:
            seen = seen | (together if family.whole_images else together & near)
        seen = seen & visible[:, None, :]
        if expected.unseen is not None and number >= expected.unseen_from:
            seen = seen & ~expected.unseen
        masks[layer] = (seen | diagonal)[:, None]  # no row without a key
        typed = {"layer_type": kinds[number]} if language.config.model_type.startswith("gemma") else {}

        def enter(
            module: nn.Module,
            args: tuple,
            kwargs: dict,
            averages: list = averages,
            given: list = [entry[1:] for entry in expected.values if entry[0] == number],  # noqa: B006
            positions: Tensor | None = positions,
            typed: dict = typed,
        ) -> Any:
            hidden = args[0]
            for into, weight in averages:
                hidden = average(hidden, weight, into)
            for changed, values in given:
                hidden = torch.where(changed[..., None], values, hidden)
            if positions is not None:
                rope = language.rotary_emb(hidden, positions, **typed)
                kwargs = {**kwargs, "position_embeddings": rope, "position_ids": positions}
            return (hidden, *args[1:]), kwargs

        if number == 0:  # what enters the LLM, before anything else is made of it
            stack.callback(language.register_forward_pre_hook(partial(_at_the_boundary, enter), with_kwargs=True).remove)
            enter = partial(enter, averages=[], given=[])  # type: ignore[assignment]
        stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        if number in expected.freeze:
            freeze = layer.register_forward_hook(lambda module, args, output: torch.where(visual[..., None], args[0], output))
            stack.callback(freeze.remove)
    return masks


def _at_the_boundary(enter: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Applies to the embeddings what happens in front of layer 0; its positions are set by that layer's own hook."""
    (hidden,), _ = enter(module, (kwargs["inputs_embeds"],), {}, positions=None)
    return args, {**kwargs, "inputs_embeds": hidden}


def window_of(config: Any, layer: int) -> int | None:
    """Returns how many tokens a layer sees, itself included; None when it sees all."""
    kinds = getattr(config, "layer_types", None)
    slides = "sliding" in kinds[layer] if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


def _in_tower(stack: ExitStack, family: Family, model: Any, batch: Batch, expected: Expected) -> dict[nn.Module, list[Tensor]]:
    """Hooks the tower's layers until `stack` is closed; returns the masks of their calls, none where nothing happens in the tower."""
    given = [
        *(keep for _, keep in expected.tower_drops),
        *(into for _, into in expected.tower_merges),
        *(v.keep for v in expected.tower_values),
    ]
    if not given:
        return {}
    shots = [shot for row in batch.shots for shot in row]
    visible = torch.ones(given[0].shape, dtype=torch.bool)
    sizes = torch.ones(visible.shape, dtype=model.dtype)
    own = torch.arange(visible.shape[1])

    def changed(change: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return family.with_units(hidden, change(family.units(hidden, shots)), shots)

    def behind(merge: TowerValues) -> tuple[Tensor, Tensor]:
        """Sizes and visible tokens after a merge with given values."""
        weight = torch.where(merge.into >= 0, sizes, 0)
        return torch.zeros_like(sizes).scatter_add(1, merge.into.clamp(min=0), weight).clamp(min=1), visible & merge.keep

    clips = [isinstance(shot, Clip) for shot in shots]
    of_view = torch.tensor([clip for clip, shot in zip(clips, shots, strict=True) for _ in family.grids(shot)])
    calls = of_view.long().argsort(stable=True)  # the tower runs on images first
    by_call = sorted(shots, key=lambda shot: isinstance(shot, Clip))
    assert len(set(clips)) == 1 or len(given) == len(expected.tower_drops), "merges are followed for one kind alone"
    masks = {}
    for number, layer in enumerate(family.tower_layers(model)):
        for at, keep in expected.tower_drops:
            if at == number:
                visible = visible & keep
        here = [merge for merge in expected.tower_values if merge.layer == number]
        for merge in (m for m in here if not m.before_mlp):
            sizes, visible = behind(merge)
            change = partial(changed, partial(_replaced, merge))
            entering = layer.register_forward_pre_hook(lambda module, args, change=change: (change(args[0]), *args[1:]))
            stack.callback(entering.remove)
        weight = sizes.log() if expected.proportional else torch.zeros_like(sizes)
        hidden = weight.masked_fill(~visible, torch.finfo(sizes.dtype).min)
        masks[layer] = family.tower_masks(model, number, by_call, hidden[calls])
        for at, into in expected.tower_merges:
            if at == number:
                _change_before_mlp(stack, family, layer, partial(changed, partial(average, sizes=sizes, into=into)))
                sizes = torch.zeros_like(sizes).scatter_add(1, into, sizes).clamp(min=1)
                visible = visible & (into == own)
        for merge in (m for m in here if m.before_mlp):
            _change_before_mlp(stack, family, layer, partial(changed, partial(_replaced, merge)))
            sizes, visible = behind(merge)
    return masks


def _replaced(merge: TowerValues, units: Tensor) -> Tensor:
    """Returns what becomes tokens `(U, P, D)` with the values of a merge."""
    return torch.where(merge.keep[..., None], merge.values.to(units.dtype), units)


def _change_before_mlp(stack: ExitStack, family: Family, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Changes what the layer's attention and its residual leave, in place, so that the MLP and its residual both get the changed values."""

    def enter(module: nn.Module, args: tuple) -> None:
        args[0].copy_(change(args[0]))

    stack.callback(family.before_mlp(layer).register_forward_pre_hook(enter).remove)


def average(hidden: Tensor, sizes: Tensor, into: Tensor) -> Tensor:
    """Returns the mean of `(B, S, D)` weighted by `sizes`, written to the position `into` names; other positions keep their value."""
    index = into[..., None].expand_as(hidden)
    total = torch.zeros_like(hidden).scatter_add(1, index, hidden * sizes[..., None])
    count = torch.zeros_like(sizes).scatter_add(1, into, sizes)
    return torch.where((count > 0)[..., None], total / count.clamp(min=1)[..., None], hidden)


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """Turns a bool mask into 0 where True, the smallest number elsewhere."""
    return torch.zeros(mask.shape, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)


@dataclass(frozen=True)
class Spot:
    """Where one image is: `(T,)` sequence positions of its visual tokens and their patch ids, in sequence order, and its newlines.

    `newlines` has one position per row of the canvas; `members` the ranks of the visual tokens of that row.
    """

    row: int
    positions: Tensor
    patches: Tensor
    newlines: tuple[int, ...]
    members: tuple[Tensor, ...]


def spots(batch: Batch) -> list[Spot]:
    """Returns one entry per image of the batch, row by row."""
    found = []
    for row, shots in enumerate(batch.shots):
        placeholders = batch.visual[row].nonzero()[:, 0]
        for shot in shots:
            packed = packing(batch.kind, shot)
            mine, placeholders = placeholders[: len(packed)], placeholders[len(packed) :]
            token = packed[:, 3] == 0
            rank = token.long().cumsum(0) - 1
            ends = (~token).nonzero()[:, 0]
            canvas = (
                int((packed[:, 0] == 0).sum()) if packed[:, 0].max() > 0 and isinstance(shot, Shot) else 0
            )  # only crops have a thumbnail
            starts = [canvas, *(ends[:-1] + 1).tolist()][: len(ends)]
            view, row_of, column = packed[token, :3].T
            grids = torch.tensor(FAMILIES[batch.kind].grids(shot))
            first = grids.prod(1).cumsum(0) - grids.prod(1)
            found.append(
                Spot(
                    row=row,
                    positions=mine[token],
                    patches=first[view] + row_of * grids[view, 1] + column,
                    newlines=tuple(mine[ends].tolist()),
                    members=tuple(rank[start:end] for start, end in zip(starts, ends.tolist(), strict=True)),
                )
            )
        assert not len(placeholders)
    return found


def keep_mask(batch: Batch, retained: Sequence[Sequence[int]], newlines: str = "rows") -> Tensor:
    """Returns `(B, S)` bool: all text, of each image the patches listed (in any order), and the newlines that the option keeps.

    Args:
        retained: original patch ids per image, row by row.
        newlines: `rows` keeps the newline of a canvas row that still has a visual token; `all`; `none`.
    """
    keep = batch.valid & ~batch.visual
    for spot, ids in zip(spots(batch), retained, strict=True):
        chosen = torch.isin(spot.patches, torch.tensor(list(ids), dtype=torch.long))
        assert int(chosen.sum()) == len(ids), "unknown or repeated patch id"
        keep[spot.row, spot.positions[chosen]] = True
        for newline, members in zip(spot.newlines, spot.members, strict=True):
            keep[spot.row, newline] = newlines == "all" or (newlines == "rows" and bool(chosen[members].any()))
    return keep


def merge_map(batch: Batch, assignment: Sequence[dict[int, int]]) -> Tensor:
    """Returns the `(B, S)` int64 position each token is averaged into, from patch id -> patch id per image; other tokens stay themselves."""
    into = torch.arange(batch.valid.shape[1]).expand(batch.valid.shape).clone()
    for spot, targets in zip(spots(batch), assignment, strict=True):
        position = dict(zip(spot.patches.tolist(), spot.positions.tolist(), strict=True))
        for source, target in targets.items():
            into[spot.row, position[source]] = position[target]
    return into


def renumbered(keep: Tensor) -> Tensor:
    """Returns `(B, S)` int64: survivors numbered 0, 1, 2, ... in each row."""
    return (keep.long().cumsum(1) - 1).clamp(min=0)


def areas_of(batch: Batch) -> list[list[int]]:
    """Returns how many visual tokens the tower makes of every view of every image, row by row."""
    return [[rows * cols for rows, cols in FAMILIES[batch.kind].grids(shot)] for row in batch.shots for shot in row]


def patches_of(batch: Batch, retained: Sequence[Sequence[int]]) -> Tensor:
    """Returns `(U, P)` bool over the views of all images: the patches listed per image, False behind a smaller view."""
    rows = []
    for areas, ids in zip(areas_of(batch), retained, strict=True):
        keep = torch.zeros(sum(areas), dtype=torch.bool)
        keep[torch.tensor(list(ids), dtype=torch.long)] = True
        rows += keep.split(areas)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def survivors(batch: Batch, keep: Tensor, shortened: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both results at the survivors, `(tokens, V)` each: rows are right aligned, with the trailing padding still behind them."""
    short, long = [], []
    for row in range(len(keep)):
        real = batch.valid[row].nonzero()[:, 0]
        behind = keep.shape[1] - 1 - int(real[-1])
        count = int(keep[row].sum())
        end = shortened.shape[1] - behind
        assert end >= count, f"row {row}: {count} survivors do not fit into {shortened.shape[1]} columns"
        short.append(shortened[row, end - count : end])
        long.append(full[row, keep[row]])
    return torch.cat(short), torch.cat(long)


def difference(batch: Batch, keep: Tensor, shortened: Tensor, full: Tensor) -> float:
    """Returns the largest absolute difference of two results at the survivors."""
    return largest(*survivors(batch, keep, shortened, full))


def largest(a: Tensor, b: Tensor) -> float:
    """Returns the largest absolute difference; infinite where either has a NaN, which Python's `max` would pass over."""
    difference = float((a - b).abs().max())
    return math.inf if math.isnan(difference) else difference
