"""Steps at new tokens: which visual tokens the later layers attend to while an answer is made. The KV cache stays whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import Images, to_device
from vtr.engine.llm.call import Call
from vtr.engine.llm.masks import all_columns, columns
from vtr.engine.selections import check_selection, chosen_mask
from vtr.engine.tokens import Groups, Spots
from vtr.engine.views import groups_of, make_view
from vtr.hosts._protocol import additive
from vtr.ops.attention_rows import attention_rows
from vtr.ops.gather import compaction
from vtr.plans import PlanStep, signal_layer
from vtr.types import View, VtrError


@dataclass
class Choices:
    """The visual tokens of one kind that one step chooses from, for as long as the KV cache lives.

    Args:
        item: the step.
        images, groups: whose tokens, and the rows of the View.
        row: prompt row of every row of the View; tokens: how many it has.
        column: `(G, N)` int64, logical column of every token; real: `(G, N)` bool; gid: `(G, N)` int64, global ids.
        memory: what the method noted.
        counts: per new token `(G,)`, tokens that the later layers attended to; the report has the same list.
    """

    item: PlanStep
    images: Images
    groups: Groups
    row: list[int]
    tokens: list[int]
    column: Tensor
    real: Tensor
    gid: Tensor
    memory: dict[str, Any]
    counts: list[Tensor]

    def view(self, signals: dict[Any, Tensor]) -> View:
        """Returns the View of the step, without values of tokens."""
        device = self.gid.device
        spots, nothing = Spots(torch.zeros_like(self.gid), self.real, self.gid), torch.zeros(1, 1, 0, device=device)
        view = make_view(
            nothing, spots, self.images, self.groups, list(self.tokens), list(self.tokens), self.item.method, self.item.step.layer
        )
        view.real, view.row, view.memory, view.signals = self.real, to_device(self.row, device), self.memory, signals
        return view

    def rows(self, old: Sequence[int]) -> None:
        """Repeats, selects or reorders prompt rows: row `i` is what row `old[i]` was."""
        pairs = [(new, group) for new, row in enumerate(old) for group, own in enumerate(self.row) if own == row]
        chosen, count = [group for _, group in pairs], len(self.row)
        pick, groups = torch.tensor(chosen, device=self.gid.device), self.groups
        lists: dict[str, Any] = {
            name: [values[group] for group in chosen] for name, values in vars(groups).items() if isinstance(values, list) and values
        }
        self.groups, self.row = replace(groups, **lists), [new for new, _ in pairs]
        self.tokens = [self.tokens[group] for group in chosen]
        self.column, self.real, self.gid = self.column[pick], self.real[pick], self.gid[pick]
        for name, value in self.memory.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == count:
                self.memory[name] = value[pick]


@dataclass
class Attending:
    """All steps at new tokens of one KV cache."""

    choices: list[Choices] = field(default_factory=list)

    @classmethod
    def of(cls, items: Sequence[PlanStep], call: Call) -> Attending:
        """Returns the steps `items` for what is left of the prompt of a call when its last layer has run."""
        prompt, found = call.prompt, cls()
        assert prompt is not None
        tokens, images = prompt.tokens, prompt.tokens.images
        for item in items:
            for among in prompt.passes(item):
                groups = groups_of(item, images.layouts, images.slots, False, among)
                counts = prompt.counts_of(groups)
                if not any(counts):
                    continue
                spots = tokens.locate(groups, max(counts))
                column = tokens.column.flatten()[spots.flat] + int(call.before)
                row = [images.row[image] for image in groups.owner]
                kind = images.layouts[groups.owner[0]].kind
                notes = images.memory.setdefault((item.method, kind), {})
                found.choices.append(Choices(item, images, groups, row, counts, column, spots.present, spots.gid, notes, prompt.attended))
        return found

    def rows(self, change: Callable[[Tensor], Tensor], count: int) -> None:
        """Lets prompt rows change as those of the cache do, which were `count`."""
        old = change(torch.arange(count)).tolist()
        for choice in self.choices:
            choice.rows(old)


@dataclass
class NewToken:
    """One forward of one new token.

    Args:
        attending: the steps.
        call: the forward.
        read: layer -> `(B, H, keys)` attention of the new token there.
        gone: `(B, columns)` bool over logical columns, visual tokens that are not attended to; from the layer of the last step that ran on.
        picked: by segment, keys that are attended to, see `pick`.
    """

    attending: Attending
    call: Call
    read: dict[int, Tensor] = field(default_factory=dict)
    gone: Tensor | None = None
    picked: dict[int, tuple[Tensor, Tensor, bool]] = field(default_factory=dict)

    def note(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Files what the new token pays to every key at a layer that a step reads."""
        self.read[layer] = attention_rows(query, key, scaling, keys=columns(self.call, layer).to(key.device))[:, :, 0]

    def choose(self, layer: int) -> None:
        """Runs the steps in front of a layer."""
        for choice in self.attending.choices:
            if choice.item.step.layer != layer:
                continue
            step, signals = choice.item.step, {}
            for signal in step.needs:
                at = signal_layer(signal, step)
                device = choice.gid.device
                weights, position = self.read[at].to(device)[to_device(choice.row, device)], self._keys_of(choice, at).to(device)
                rows = weights.gather(2, position[:, None].expand(-1, weights.shape[1], -1)).masked_fill(~choice.real[:, None], 0.0)
                signals[signal] = rows if signal.heads else rows.mean(1)
            view = choice.view(signals)
            assert step.select is not None
            selection = step.select(view)
            check_selection(choice.item.name, selection, view)
            kept = chosen_mask(selection, view) & choice.real
            choice.counts.append(kept.sum(1))
            self._leave_out(choice, choice.real & ~kept)

    def _keys_of(self, choice: Choices, layer: int) -> Tensor:
        """Returns the key `(G, N)` of every token of a View at a layer."""
        where, width = all_columns(self.call, layer), int(self.call.before) + self.call.incoming
        table = torch.zeros(len(where), width + 1, dtype=torch.int64, device=where.device)
        places = torch.arange(where.shape[1], device=where.device).expand_as(where)
        table.scatter_(1, torch.where(where >= 0, where, width), places)
        return table[to_device(choice.row, where.device)].gather(1, choice.column.to(where.device))

    def _leave_out(self, choice: Choices, tokens: Tensor) -> None:
        """Adds tokens `(G, N)` bool to what later layers do not attend to."""
        batch, width = len(self.call.now[0]), int(self.call.before) + self.call.incoming
        if self.gone is None:
            self.gone = torch.zeros(batch, width + 1, dtype=torch.bool, device=tokens.device)
        flat = to_device(choice.row, tokens.device)[:, None] * (width + 1) + torch.where(tokens, choice.column, width)
        gone = self.gone.flatten().clone()
        gone[flat.flatten()] = True
        self.gone = gone.view_as(self.gone)
        self.gone[:, width] = False
        self.picked.clear()

    def pick(self, layer: int) -> tuple[Tensor, Tensor, bool] | None:
        """Returns the keys that a layer attends to: `index (B, K')` int64 into those of its cache, `real (B, K')` bool, and whether all are
        real; None in front of the first step."""
        if self.gone is None:
            return None
        segment = self.call.segment[layer]
        if segment not in self.picked:
            real, where = columns(self.call, layer), all_columns(self.call, layer)
            gone = self.gone.to(where.device).gather(1, where.clamp_min(0)) & (where >= 0)
            keep = real & ~gone
            counts = keep.sum(1).tolist()  # the one host sync of a new token
            self.picked[segment] = (*compaction(keep, max(counts)), len(set(counts)) == 1)
        return self.picked[segment]


def chosen_keys(current: Callable[[], NewToken | None], layer: int) -> Callable[..., Any]:
    """A detour for a layer behind such a step: its attention gets the chosen keys only.

    Args:
        current: the new token that runs in this thread, if a step acts on it.
        layer: of the LLM.
    """

    def run(function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        token = current()
        picked = None if token is None or query.shape[2] != 1 else token.pick(layer)
        if picked is None:
            return function(module, query, key, value, mask, *args, **kwargs)
        index, real, all_real = picked[0].to(key.device), picked[1].to(key.device), picked[2]
        where = index[:, None, :, None]
        key, value = (part.gather(2, where.expand(-1, part.shape[1], -1, part.shape[3])) for part in (key, value))
        return function(module, query, key, value, _mask_of(mask, index, real, all_real, query), *args, **kwargs)

    return run


def _mask_of(mask: Any, index: Tensor, real: Tensor, all_real: bool, query: Tensor) -> Any:
    """Returns the mask of chosen keys, from that of all keys: None, `(B, keys)`, or `(B or 1, 1, 1, keys)` bool or additive."""
    if not isinstance(mask, Tensor):
        return None if all_real else real[:, None, None]
    if mask.ndim == 2:
        return mask.expand(len(index), -1).gather(1, index) & real if mask.dtype == torch.bool else mask.gather(1, index) * real
    own = mask.expand(len(index), -1, -1, -1).gather(3, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    if own.dtype == torch.bool:
        return own & real[:, None, None]
    return own + additive(real[:, None, None], query.dtype)


def check_cache(cache: Any, state: Any, name: str, answered: bool) -> None:
    """Refuses a cache on which steps at new tokens, or the removal of earlier keys, cannot be followed.

    Args:
        cache: of the prompt, or None; state: what an earlier reduced call left in it; name: of the method.
        answered: new tokens stand behind the prompt.

    Raises:
        VtrError: it is static, there is none while an answer is made, or a turn with images or videos is in it already.
    """
    if cache is None and answered:
        raise VtrError(f"{name}: changes which keys of a cache are used, and there is none; generate with use_cache=True")
    if cache is not None and cache.is_compileable:
        raise VtrError(f"{name}: changes which keys of a cache are used, which a static cache cannot follow; use a dynamic cache")
    if state is not None and state.attending is not None:
        raise VtrError(f"{name}: a later turn with an image or a video is not followed while new tokens choose; begin with a new cache")
