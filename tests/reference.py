"""What a reduced model must compute, by the unmodified model at full length with explicit masks. Imports nothing of vtr.

A token that is gone from layer k on is hidden from every other token's attention from layer k on. A merged token is overwritten by the
mean of what it stands for, a frozen one by its own input. All by plain hooks on single layers, removed at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_models import SIDE, Batch, packing, views_of


@dataclass
class Expected:
    """What happened to the tokens of a batch; build it with the functions below, in model order.

    Args:
        drops: (LLM layer, `(B, S)` bool kept from the input of that layer on).
        merges: (LLM layer, `(B, S)` int64 position each token is averaged into at the input of that layer).
        positions: (LLM layer, `(B, S)` int64 rotary positions from that layer on).
        freeze: LLM layers in which placeholders keep their values.
        tower_drops: (tower layer, `(U, P)` bool patches kept from the input of that layer on), U = tower inputs.
        tower_merges: (tower layer, `(U, P)` int64 patch each patch is averaged into between that layer's attention and MLP).
        proportional: whether a key weighs log(size) after a tower merge.
    """

    drops: list[tuple[int, Tensor]] = field(default_factory=list)
    merges: list[tuple[int, Tensor]] = field(default_factory=list)
    positions: list[tuple[int, Tensor]] = field(default_factory=list)
    freeze: tuple[int, ...] = ()
    tower_drops: list[tuple[int, Tensor]] = field(default_factory=list)
    tower_merges: list[tuple[int, Tensor]] = field(default_factory=list)
    proportional: bool = True


@torch.no_grad()
def masked_logits(model: Any, batch: Batch, expected: Expected) -> Tensor:
    """Logits `(B, S, V)` of the full-length model in which what `expected` says is hidden, averaged or frozen."""
    with ExitStack() as stack:
        stack.enter_context(_llm_hooks(model, batch, expected))
        stack.enter_context(_tower_hooks(model, expected))
        return model(**batch.inputs, position_ids=batch.positions, use_cache=False).logits


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _llm_hooks(model: Any, batch: Batch, expected: Expected) -> Any:
    visible, visual = batch.valid, batch.visual
    length = visible.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    diagonal = torch.eye(length, dtype=torch.bool)
    sizes = torch.ones(visible.shape, dtype=model.dtype)
    positions: Tensor | None = None
    language = model.model.language_model
    handles = []
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
        seen = (distance >= 0) & (distance < (window_of(language.config, number) or length))
        mask = (seen & visible[:, None, None, :]) | diagonal  # no row without a key
        kinds = getattr(language.config, "layer_types", None)
        typed = {"layer_type": kinds[number]} if language.config.model_type == "gemma3_text" else {}

        def enter(
            module: nn.Module,
            args: tuple,
            kwargs: dict,
            mask: Tensor = mask,
            averages: list = averages,
            positions: Tensor | None = positions,
            typed: dict = typed,
        ) -> Any:
            hidden = args[0]
            for into, weight in averages:
                hidden = average(hidden, weight, into)
            kwargs = {**kwargs, "attention_mask": additive(mask, hidden) if model.config._attn_implementation == "eager" else mask}
            if positions is not None:
                kwargs["position_embeddings"] = language.rotary_emb(hidden, positions, **typed)
            return (hidden, *args[1:]), kwargs

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        if number in expected.freeze:
            handles.append(layer.register_forward_hook(lambda module, args, output: torch.where(visual[..., None], args[0], output)))
    return _hooks(handles)


def window_of(config: Any, layer: int) -> int | None:
    """How many tokens a layer sees, itself included; None when it sees all."""
    kinds = getattr(config, "layer_types", None)
    slides = "sliding" in kinds[layer] if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


def _tower_hooks(model: Any, expected: Expected) -> Any:
    if not expected.tower_drops and not expected.tower_merges:
        return _hooks([])
    prefix = 1 if hasattr(model.model.vision_tower.embeddings, "class_embedding") else 0
    first = (expected.tower_drops + expected.tower_merges)[0][1]
    visible = torch.ones(len(first), first.shape[1] + prefix, dtype=torch.bool)
    sizes = torch.ones(visible.shape, dtype=model.dtype)
    own = torch.arange(visible.shape[1])
    head = own[:prefix].expand(len(first), prefix)
    diagonal = torch.eye(visible.shape[1], dtype=torch.bool)
    handles = []
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        for at, keep in expected.tower_drops:
            if at == number:
                visible = visible & torch.cat([torch.ones_like(head, dtype=torch.bool), keep], 1)

        bias = sizes.log() if expected.proportional else torch.zeros_like(sizes)

        def enter(module: nn.Module, args: tuple, kwargs: dict, visible: Tensor = visible, bias: Tensor = bias) -> Any:
            mask = additive(visible[:, None, None, :] | diagonal, args[0]) + bias[:, None, None, :]
            return (args[0], mask, *args[2:]), {k: v for k, v in kwargs.items() if k != "attention_mask"}

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        for at, patches in expected.tower_merges:
            if at == number:
                into = torch.cat([head, patches + prefix], 1)
                handles += _merge_before_mlp(layer, into, sizes)
                sizes = torch.zeros_like(sizes).scatter_add(1, into, sizes).clamp(min=1)
                visible = visible & (into == own)
    return _hooks(handles)


def _merge_before_mlp(layer: nn.Module, into: Tensor, sizes: Tensor) -> list[Any]:
    """The layer's output as if what its attention left had been averaged into `into` before its MLP."""
    seen: dict[str, Tensor] = {}

    def after_attention(module: nn.Module, args: tuple) -> None:
        seen["hidden"] = args[0]

    def leave(module: Any, args: tuple, output: Tensor) -> Tensor:
        merged = average(seen["hidden"], sizes, into)
        norm = module.layer_norm2
        return merged + module.mlp(nn.functional.layer_norm(merged, norm.normalized_shape, norm.weight, norm.bias, norm.eps))

    return [layer.layer_norm2.register_forward_pre_hook(after_attention), layer.register_forward_hook(leave)]


def average(hidden: Tensor, sizes: Tensor, into: Tensor) -> Tensor:
    """Mean of `(B, S, D)` weighted by `sizes`, written to the position `into` names; other positions keep their value."""
    index = into[..., None].expand_as(hidden)
    total = torch.zeros_like(hidden).scatter_add(1, index, hidden * sizes[..., None])
    count = torch.zeros_like(sizes).scatter_add(1, into, sizes)
    return torch.where((count > 0)[..., None], total / count.clamp(min=1)[..., None], hidden)


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """Bool mask -> 0 where True, the smallest number elsewhere."""
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
    """One entry per image of the batch, row by row."""
    found = []
    for row, shots in enumerate(batch.shots):
        placeholders = batch.visual[row].nonzero()[:, 0]
        for shot in shots:
            packed = packing(batch.kind, shot)
            mine, placeholders = placeholders[: len(packed)], placeholders[len(packed) :]
            token = packed[:, 3] == 0
            rank = token.long().cumsum(0) - 1
            ends = (~token).nonzero()[:, 0]
            starts = [int((packed[:, 0] == 0).sum()), *(ends[:-1] + 1).tolist()][: len(ends)]
            view, row_of, column = packed[token, :3].T
            found.append(
                Spot(
                    row=row,
                    positions=mine[token],
                    patches=(view * SIDE + row_of) * SIDE + column,
                    newlines=tuple(mine[ends].tolist()),
                    members=tuple(rank[start:end] for start, end in zip(starts, ends.tolist(), strict=True)),
                )
            )
        assert not len(placeholders)
    return found


def keep_mask(batch: Batch, retained: Sequence[Sequence[int]], newlines: str = "rows") -> Tensor:
    """`(B, S)` bool: all text, of each image the patches listed (in any order), and the newlines that the option keeps.

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
    """`(B, S)` int64 position each token is averaged into, from patch id -> patch id per image; other tokens stay themselves."""
    into = torch.arange(batch.valid.shape[1]).expand(batch.valid.shape).clone()
    for spot, targets in zip(spots(batch), assignment, strict=True):
        position = dict(zip(spot.patches.tolist(), spot.positions.tolist(), strict=True))
        for source, target in targets.items():
            into[spot.row, position[source]] = position[target]
    return into


def renumbered(keep: Tensor) -> Tensor:
    """`(B, S)` int64: survivors numbered 0, 1, 2, ... in each row."""
    return (keep.long().cumsum(1) - 1).clamp(min=0)


def patches_of(batch: Batch, retained: Sequence[Sequence[int]]) -> Tensor:
    """`(U, P)` bool over the tower's inputs: the patches listed per image."""
    views = [views_of(batch.kind, shot) for row in batch.shots for shot in row]
    keep = torch.zeros(sum(views) * SIDE * SIDE, dtype=torch.bool)
    start = 0
    for count, ids in zip(views, retained, strict=True):
        keep[start + torch.tensor(list(ids), dtype=torch.long)] = True
        start += count * SIDE * SIDE
    return keep.view(-1, SIDE * SIDE)


def survivors(batch: Batch, keep: Tensor, shortened: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Both results at the survivors, `(tokens, V)` each: rows are right aligned, with the trailing padding still behind them."""
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
    """Largest absolute difference of two results at the survivors."""
    return largest(*survivors(batch, keep, shortened, full))


def largest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where either has a NaN, which Python's `max` would pass over."""
    difference = float((a - b).abs().max())
    return math.inf if math.isnan(difference) else difference
