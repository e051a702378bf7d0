"""Steps at new tokens: which visual tokens the later layers attend to while an answer is made. The KV cache stays whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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

REMEMBERED = 64
"""New tokens after which a method's notes are known, so that a draft's guesses can be taken back."""


class Earlier(NamedTuple):
    """Before one new token: its logical column, what the method had noted, and the tokens that it attended to, `(G,)`."""

    column: int
    memory: dict[str, Any]
    attended: Tensor


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
        earlier: of the last new tokens; asked: how many have chosen.
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
    earlier: deque[Earlier] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    asked: int = 0

    def chosen(self, column: int, signals: dict[Any, Tensor]) -> Tensor:
        """Runs the step for the new token at a logical column; returns what it attends to, `(G, N)` bool."""
        view, before = self.view(signals), dict(self.memory)
        assert self.item.step.select is not None
        selection = self.item.step.select(view)
        check_selection(self.item.name, selection, view)
        kept = chosen_mask(selection, view) & self.real
        self.counts.append(kept.sum(1))
        self.earlier.append(Earlier(column, before, self.counts[-1]))
        self.asked += 1
        return kept

    def crop(self, length: int) -> None:
        """Forgets the new tokens from a logical column on.

        Raises:
            VtrError: what the method had noted before them is not known any more.
        """
        known = len(self.earlier)
        while self.earlier and self.earlier[-1].column >= length:
            column, memory, attended = self.earlier.pop()
            self.counts[:] = [counts for counts in self.counts if counts is not attended]
            self.memory.clear()
            self.memory.update(memory)
            if not self.earlier and column > length and self.asked > known and memory:
                raise VtrError(
                    f"{self.item.name}: new tokens choose keys by what those before them paid, which is known of the last {REMEMBERED} only, got a "
                    "cache that was cropped by more; begin with a new cache"
                )
        self.asked -= known - len(self.earlier)

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
        self.earlier.clear()
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

    def crop(self, length: int) -> None:
        """Forgets new tokens from a logical column on, see `Choices.crop`."""
        for choice in self.choices:
            choice.crop(length)

    def rows(self, change: Callable[[Tensor], Tensor], count: int) -> None:
        """Lets prompt rows change as those of the cache do, which were `count`."""
        old = change(torch.arange(count)).tolist()
        for choice in self.choices:
            choice.rows(old)


@dataclass
class NewTokens:
    """The new tokens of one forward, its last `count`: one, or several where a draft guessed. Each chooses as if it came alone.

    Args:
        call: the forward.
        count: how many they are.
        attending: the steps; None where the prompt is in the same call, until the first of them runs.
        read: layer -> `(B, H, count, keys)` attention of the new tokens there.
        gone: `(B, count, columns)` bool over logical columns, visual tokens that are not attended to; from the layer of the last step that ran on.
        picked: by segment and token, keys that are attended to, see `pick`.
    """

    call: Call
    count: int
    attending: Attending | None = None
    read: dict[int, Tensor] = field(default_factory=dict)
    gone: Tensor | None = None
    picked: dict[tuple[int, int], tuple[Tensor, Tensor, bool]] = field(default_factory=dict)

    def note(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Files what the new tokens pay to every key at a layer that a step reads."""
        keys = torch.arange(key.shape[2], device=key.device)
        own = keys[-self.count :].expand(len(key), -1)
        real = columns(self.call, layer).to(key.device)
        self.read[layer] = attention_rows(query[:, :, -self.count :], key, scaling, keys=real, positions=own)

    def choose(self, layer: int, items: Sequence[PlanStep]) -> None:
        """Runs the steps in front of a layer, for one new token after the other; `items` are those of the plan."""
        if not any(item.step.layer == layer for item in items):
            return
        if self.attending is None:
            self.attending = Attending.of(items, self.call)
        first = int(self.call.before) + self.call.incoming - self.count
        for number in range(self.count):  # what one chooses may depend on what the one before it paid
            for choice in self.attending.choices:
                if choice.item.step.layer == layer:
                    kept = choice.chosen(first + number, self._signals(choice, number))
                    self._leave_out(choice, number, choice.real & ~kept)

    def _signals(self, choice: Choices, number: int) -> dict[Any, Tensor]:
        """Returns what a step reads of one new token."""
        signals, device = {}, choice.gid.device
        for signal in choice.item.step.needs:
            at = signal_layer(signal, choice.item.step)
            weights = self.read[at][:, :, number].to(device)[to_device(choice.row, device)]
            position = self._keys_of(choice, at).to(device)
            rows = weights.gather(2, position[:, None].expand(-1, weights.shape[1], -1)).masked_fill(~choice.real[:, None], 0.0)
            signals[signal] = rows if signal.heads else rows.mean(1)
        return signals

    def _keys_of(self, choice: Choices, layer: int) -> Tensor:
        """Returns the key `(G, N)` of every token of a View at a layer."""
        where, width = all_columns(self.call, layer), int(self.call.before) + self.call.incoming
        table = torch.zeros(len(where), width + 1, dtype=torch.int64, device=where.device)
        places = torch.arange(where.shape[1], device=where.device).expand_as(where)
        table.scatter_(1, torch.where(where >= 0, where, width), places)
        return table[to_device(choice.row, where.device)].gather(1, choice.column.to(where.device))

    def _leave_out(self, choice: Choices, number: int, tokens: Tensor) -> None:
        """Adds tokens `(G, N)` bool to what later layers do not attend to for one new token."""
        batch, width = len(self.call.now[0]), int(self.call.before) + self.call.incoming
        if self.gone is None:
            self.gone = torch.zeros(batch, self.count, width + 1, dtype=torch.bool, device=tokens.device)
        own = self.gone[:, number].clone().flatten()
        flat = to_device(choice.row, tokens.device)[:, None] * (width + 1) + torch.where(tokens, choice.column, width)
        own[flat.flatten()] = True
        self.gone[:, number] = own.view(batch, -1)
        self.gone[:, number, width] = False
        self.picked.clear()

    def pick(self, layer: int, number: int) -> tuple[Tensor, Tensor, bool] | None:
        """Returns the keys that a layer attends to for one new token: `index (B, K')` int64 into those of its cache, `real (B, K')` bool, and
        whether all are real; None in front of the first step."""
        if self.gone is None:
            return None
        at = self.call.segment[layer], number
        if at not in self.picked:
            real, where = columns(self.call, layer), all_columns(self.call, layer)
            gone = self.gone[:, number].to(where.device).gather(1, where.clamp_min(0)) & (where >= 0)
            keep = real & ~gone
            keep[:, real.shape[1] - self.count + number + 1 :] = False  # new tokens behind this one
            counts = keep.sum(1).tolist()  # the one host sync of a new token
            self.picked[at] = (*compaction(keep, max(counts)), len(set(counts)) == 1)
        return self.picked[at]


def new_tokens(call: Call, entry_prompt: int | None, items: Sequence[PlanStep], removing: Sequence[PlanStep]) -> NewTokens | None:
    """Returns the new tokens of a call that choose keys, None where there are none. Text of a later turn attends to all keys, as the first does.

    Args:
        call: the forward.
        entry_prompt: how many of its columns are prompt; None where nothing says it: a single token behind a prompt is new, several are text.
        items: steps at new tokens.
        removing: all that remove tokens inside the LLM.

    Raises:
        VtrError: guesses of a draft stand behind the prompt in its own call and cannot choose as they would alone.
    """
    state, attending = call.state, None if call.state is None else call.state.attending
    prompt = 0 if state is not None and call.incoming == 1 else call.incoming if entry_prompt is None else max(entry_prompt, 0)
    count = call.incoming - prompt
    if not items or count < 1 or (call.prompt is None and attending is None):
        return None
    late = next((item for item in removing if item.step.layer > min(one.step.layer for one in items)), None)
    twice = len({item.method for item in items}) < len(items)
    if (call.prompt is not None and late is not None) or (count > 1 and twice):
        reason = f"{late.name} removes tokens behind it" if late is not None else "it chooses in front of several layers"
        raise VtrError(
            f"{items[0].name}: several new tokens at once, as in assisted decoding and prompt lookup, cannot choose keys as each would alone, since "
            f"{reason}; generate without assistant_model and prompt_lookup_num_tokens"
        )
    return NewTokens(call, count, None if call.prompt is not None else attending)


def chosen_keys(current: Callable[[], NewTokens | None], layer: int) -> Callable[..., Any]:
    """A detour for a layer behind such a step: its attention gets, for every new token, the chosen keys only.

    Args:
        current: the new tokens that run in this thread, if a step acts on them.
        layer: of the LLM.
    """

    def run(function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = current()
        if tokens is None or tokens.gone is None or query.shape[2] < tokens.count:
            return function(module, query, key, value, mask, *args, **kwargs)

        def alone(number: int) -> Any:
            picked = tokens.pick(layer, number)
            assert picked is not None
            index, real, all_real = picked[0].to(key.device), picked[1].to(key.device), picked[2]
            where, at = index[:, None, :, None], query.shape[2] - tokens.count + number
            keys, values = (part.gather(2, where.expand(-1, part.shape[1], -1, part.shape[3])) for part in (key, value))
            asked = query[:, :, at : at + 1]
            return function(module, asked, keys, values, _mask_of(mask, at, index, real, all_real, query), *args, **kwargs)

        if query.shape[2] == 1:
            return alone(0)
        made = [alone(number)[0] for number in range(tokens.count)]
        if query.shape[2] > tokens.count:  # a prompt in front of them, which attends to all keys
            made.insert(0, function(module, query, key, value, mask, *args, **kwargs)[0][:, : -tokens.count])
        return torch.cat(made, 1), None

    return run


def _mask_of(mask: Any, at: int, index: Tensor, real: Tensor, all_real: bool, query: Tensor) -> Any:
    """Returns the mask of the keys that query `at` chose, from that of all keys: None, `(B, keys)`, or `(B or 1, 1, q, keys)` bool or additive."""
    if not isinstance(mask, Tensor):
        return None if all_real else real[:, None, None]
    if mask.ndim == 2:
        return mask.expand(len(index), -1).gather(1, index) & real if mask.dtype == torch.bool else mask.gather(1, index) * real
    mask = mask[:, :, at : at + 1]
    own = mask.expand(len(index), -1, -1, -1).gather(3, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    if own.dtype == torch.bool:
        return own & real[:, None, None]
    return own + additive(real[:, None, None], query.dtype)


def check_cache(cache: Any, state: Any, item: PlanStep, answered: bool) -> None:
    """Refuses a cache on which steps at new tokens, or the removal of earlier keys, cannot be followed.

    Args:
        cache: of the prompt, or None; state: what an earlier reduced call left in it.
        item: a step at new tokens, or one that removes earlier keys.
        answered: new tokens stand behind the prompt.

    Raises:
        VtrError: it is static, there is none while an answer is made, a turn with images or videos is in it already, or guesses of a draft would
            see keys that go.
    """
    name = item.name
    if cache is None and answered:
        raise VtrError(f"{name}: changes which keys of a cache are used, and there is none; generate with use_cache=True")
    if cache is not None and cache.is_compileable:
        raise VtrError(f"{name}: changes which keys of a cache are used, which a static cache cannot follow; use a dynamic cache")
    if answered and item.step.earlier_keys:
        raise VtrError(
            f"{name}: removes keys of earlier layers behind the prompt, which guesses of a draft in the same call have seen by then (assisted "
            "decoding, prompt lookup); generate without assistant_model and prompt_lookup_num_tokens"
        )
    if state is not None and state.attending is not None:
        raise VtrError(f"{name}: a later turn with an image or a video is not followed while new tokens choose; begin with a new cache")
