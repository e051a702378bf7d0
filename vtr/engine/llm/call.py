"""One forward of the language model, and what travels with its KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtr.engine.llm.positions import Positions
from vtr.engine.llm.prompt import Prompt


@dataclass
class Decoding:
    """What travels with one KV cache: which keys of each layer are real, and how positions were moved.

    Args:
        valid: per layer `(B, keys)` bool; layers between two removals share the tensor. For compileable caches the full cache size with the
            future True (causality hides it), so that decoding never changes a shape.
        segment: per layer a number, the same for layers that see the same keys.
        shift: per layer None or `(B, 1)` int64, how far positions were moved down by renumbering.
        where: per layer `(B, K)` int64, the logical column (counted as if nothing had been removed) of the first K keys, -1 for filler; keys
            behind them continue at `logical`. Layers between two removals share the tensor.
        logical: logical length where `where` ends.
        counted: the first layer that has keys, whose length is the cache's; layers of linear attention have none.
        dropped: logical minus physical length of that layer; constant while decoding and when the cache is cropped.
        static: the cache is compileable.
        attending: steps at new tokens, None where the plan has none.
    """

    valid: list[Tensor] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    shift: list[Tensor | None] = field(default_factory=list)
    where: list[Tensor] = field(default_factory=list)
    logical: int = 0
    counted: int = 0
    dropped: int = 0
    static: bool = False
    attending: Any = None

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Repeats, selects or reorders prompt rows as the cache does: `change` maps a tensor with rows first to the new one."""
        if self.attending is not None:
            self.attending.rows(change, len(self.valid[0]))
        known: dict[int, Any] = {id(None): None}
        lists: tuple[list[Any], ...] = (self.valid, self.shift, self.where)
        for tensors in lists:
            for i, tensor in enumerate(tensors):
                if id(tensor) not in known:
                    known[id(tensor)] = change(tensor)
                tensors[i] = known[id(tensor)]


@dataclass
class Call:
    """One forward of the language model: its keys and positions, and its prompt if it has one with visual tokens.

    Args:
        cache: its KV cache, or None; state: what an earlier reduced call left in it; static: it is compileable and holds a reduction already.
        before: tokens in front of this call, those that were removed included; incoming: tokens of this call before any removal.
        positions: positions of the tokens that are left.
        past, now: per layer `(B, keys)` bool, real columns of the cache and of this call; `segment` numbers layers that share them.
        now_where: per layer `(B, S)` int64, original column in this call of every token there, -1 for filler; None = all columns in order.
        given: segment whose keys the model's own mask is made for, set once the boundary is passed.
        windowed: the prompt is longer than the window of sliding-window layers, whose masks are then made from logical columns.
        own_masks: by type of layer, the 4-D masks of a model whose images see themselves, for all tokens of the call.
        masks: masks made so far, by segment.
        token: the new tokens of this call, where steps choose what they attend to.
        prompt: the prompt, when visual tokens come with this call and the plan acts on them.
    """

    cache: Any
    state: Decoding | None
    static: bool
    before: Any
    incoming: int
    positions: Positions
    past: list[Tensor | None]
    now: list[Tensor]
    now_where: list[Tensor | None]
    segment: list[int]
    given: int = 0
    windowed: bool = False
    own_masks: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[tuple, Any] = field(default_factory=dict)
    token: Any = None
    prompt: Prompt | None = None

    @property
    def reduced(self) -> bool:
        """Whether anything is shorter or masked by us, in this call or earlier in this cache."""
        return self.state is not None or (self.prompt is not None and self.prompt.short)

    def shortened(self, layer: int) -> None:
        """Follows the prompt when it has become shorter at the input of `layer`: layers from there on see other keys."""
        assert self.prompt is not None
        tokens, behind = self.prompt.tokens, len(self.now) - layer
        self.now = self.now[:layer] + [tokens.valid] * behind
        self.now_where = self.now_where[:layer] + [tokens.column] * behind
        offset = max(self.segment) + 1
        self.segment = self.segment[:layer] + [number + offset for number in self.segment[layer:]]

    def move(self, device: torch.device) -> None:
        """Follows a model that is split over devices: everything that is known of the prompt goes to `device`."""
        if self.prompt is None or self.prompt.tokens.column.device == device:
            return
        images = self.prompt.tokens.images
        for owner in (self.prompt.tokens, images, self.positions, self.prompt):
            for name, value in vars(owner).items():
                if isinstance(value, Tensor):
                    setattr(owner, name, value.to(device))
        images.tables = {key: table.to(device) for key, table in images.tables.items()}
        for notes in images.memory.values():
            notes.update({key: value.to(device) for key, value in notes.items() if isinstance(value, Tensor)})
