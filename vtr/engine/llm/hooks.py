"""The hooks on the base model, the language model and its layers: boundary, prefill, and decoding of a shortened cache."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine.llm import freeze
from vtr.engine.llm.attend import Attending, NewTokens, check_cache, chosen_keys, new_tokens
from vtr.engine.llm.beside import Beside
from vtr.engine.llm.cache import check_prefill, check_returned, check_unknown, check_window, evict, past_columns, state_of, store
from vtr.engine.llm.call import Call, Decoding
from vtr.engine.llm.entry import Entry, check_history, continued, kinds_given, placeholders
from vtr.engine.llm.frame_scores import FrameScores
from vtr.engine.llm.generating import Generating, repeats
from vtr.engine.llm.lifetime import refuse_growth
from vtr.engine.llm.masks import all_columns, columns, count_rows, mask, only_padding, own_columns, own_masks
from vtr.engine.llm.positions import Positions
from vtr.engine.llm.prompt import Prompt
from vtr.engine.llm.text_tower import Questions, TextTower
from vtr.engine.signals import Tap, io_recorder
from vtr.hosts._layout import Kind
from vtr.hosts._probe import by_name
from vtr.hosts._protocol import Host
from vtr.hosts._taps import TAPS
from vtr.hosts._versions import CACHE_NAMES, cache_keyword, given_cache
from vtr.hosts._wrappers import modules_of
from vtr.ops.gather import take
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import VtrError

ENCODED = "vtr_encoded"
"""Key under which the output of `get_image_features` carries what the tower leaves for the LLM."""


class LlmHooks:
    """Hooks from the base model on. State is per thread and per call; state that must survive a call is stored per cache."""

    def __init__(
        self, host: Host, plan: Plan, finished: Any, questions: Questions | None = None, frame_scores: FrameScores | None = None
    ) -> None:
        self.host, self.plan, self.finished, self.questions = host, plan, finished, questions or Questions()
        self.frame_scores = frame_scores
        self.states: weakref.WeakKeyDictionary[Any, Decoding] = weakref.WeakKeyDictionary()
        self.entries: dict[int, Entry] = {}
        self.late: dict[int, Any] = {}  # per thread, arguments of the outer model that get their values at the end of the LLM
        self.generating = Generating()
        self.blocks = list(host.language.blocks)
        parents = (m for m in modules_of(host.language.module) if any(child is host.language.blocks for child in m.children()))
        self.stack = next(parents, host.language.module)  # whose blocks they are; a wrapper may be around it
        self.acts = [s for s in plan.steps if s.step.stage in ("boundary", "prefill", "decode")]
        self.attends, self.evicts = plan.at("decode"), [s for s in plan.steps if s.step.earlier_keys]
        self.removing = [s for s in plan.at("prefill") if s.removes]
        self.needs_tower = any(s.in_tower for s in plan.steps)
        self.watched = plan.signals(tower=False)
        self.last_use = plan.last_use(tower=False)
        sources = {n.source for s in plan.steps for n in s.step.needs if n.kind == "text_embedding"}
        self.text_towers = {source: TextTower(source) for source in sources if source}

    # ---- one entry per thread; a compiled step has no threads to tell apart
    @property
    def entry(self) -> Entry | None:
        return self.entries.get(0 if torch.compiler.is_compiling() else threading.get_ident())

    @entry.setter
    def entry(self, entry: Entry | None) -> None:
        key = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if entry is None:
            self.entries.pop(key, None)
        else:
            self.entries[key] = entry

    @property
    def call(self) -> Call | None:
        """The forward of the language model that runs in this thread, if anything of ours is in it."""
        entry = self.entry
        return None if entry is None else entry.call

    def install(self, undo: list[Any]) -> None:
        """Registers every hook; what `remove()` must undo is appended as it happens."""
        host, language = self.host, self.host.language
        undo += self.generating.install(host.model)
        undo.append(host.base.register_forward_pre_hook(self.enter_base, with_kwargs=True).remove)
        undo.append(host.base.register_forward_hook(self.leave_base, always_call=True).remove)
        undo.append(language.module.register_forward_pre_hook(self.enter_language, with_kwargs=True).remove)
        undo.append(language.module.register_forward_hook(self.leave_language, always_call=True).remove)
        for i, block in enumerate(language.blocks):
            undo.append(block.register_forward_pre_hook(self._layer_hook(i), with_kwargs=True).remove)
            if self.plan.at("prefill", i, action="freeze"):
                undo.append(block.register_forward_hook(self._refill_hook(i), with_kwargs=True).remove)
                if language.backend.startswith("flash"):
                    undo.append(TAPS.detour(language.attention(block), freeze.by_runs(lambda: self.call, i)))
        for i in range(min((s.step.layer for s in self.attends), default=len(self.blocks)), len(self.blocks)):
            undo.append(TAPS.detour(language.attention(language.blocks[i]), chosen_keys(self._new_tokens, i)))
        for i in {signal_layer(need, s.step) for s in self.attends for need in s.step.needs}:
            undo.append(TAPS.watch(language.attention(language.blocks[i]), self._read_new_token(i)))
        for i, signals in self.watched.items():
            block, kinds = language.blocks[i], {s.kind for s in signals}
            if kinds & {"rows", "q", "k", "v"}:
                undo.append(TAPS.watch(language.attention(block), self._record(i)))
            for kind, half in (("attention_io", language.attention), ("mlp_io", language.mlp)):
                if kind in kinds:
                    undo.append(half(block).register_forward_hook(io_recorder(kind, partial(self._tap, i)), with_kwargs=True).remove)
            if "mlp_activation" in kinds:
                assert language.down is not None
                undo.append(language.down(block).register_forward_pre_hook(self._record_activation(i)).remove)

    def clear(self) -> None:
        """Forgets every cache and call; caches that were shortened refuse to go on without their reduction."""
        refuse_growth(self.states)
        self.states.clear()
        self.entries.clear()
        self.late.clear()

    # ---- base model: which positions of this call are visual
    def enter_base(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args, kwargs = by_name(module, args, kwargs)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        source = ids if ids is not None else embeds
        kwargs = dict(kwargs)
        positions = kwargs.pop("visual_positions", None)
        self.entry = entry = Entry(outer=self.entry, mask=kwargs.get("attention_mask"))
        if source is not None:
            kwargs = continued(self.host, self.states, kwargs, source)
        if source is None or source.shape[1] == 1:
            return args, kwargs
        language = self.host.language
        if list(language.blocks) != self.blocks or not any(child is language.blocks for child in self.stack.children()):
            raise VtrError("vtr: the model's layers were replaced since vtr.apply; remove() the reduction and apply it again")
        check_history(self.states, kwargs, source.shape[1])
        if positions is not None:
            entry.visuals = {self.host.shown("image"): positions.bool()}
        else:
            given = list(self.host.encode) if ids is None else kinds_given(self.host, kwargs)
            if given:
                found = placeholders(self.host, module, ids, embeds, given_cache(kwargs))
                entry.visuals = {self.host.shown(kind): found[kind] for kind in given if kind in found}
        entry.ids = ids if self.text_towers else None
        expand, entry.prompt, piece = self.generating.take(source.shape[1])
        if piece and any(bool(visual.any()) for visual in entry.visuals.values()):
            raise VtrError(
                "vtr: prefill_chunk_size cuts the prompt into pieces, and a reduction would read one of them for the whole; leave it out"
            )
        entry.expand = repeats(source, expand)
        entry.late = self.late.pop(threading.get_ident(), None)
        entry.answers = None if entry.late is None else entry.late.answers(*source.shape[:2])
        made = kwargs.get("mm_encoder_outputs") or {}
        entry.encoded = {
            self.host.shown(kind): made[kind][ENCODED]
            for kind in self.host.encode
            if isinstance(made.get(kind), dict) and ENCODED in made[kind]
        }
        return args, kwargs

    def leave_base(self, _module: Any, _args: tuple, _output: Any) -> None:
        """Goes on with the call that this one interrupted, also after an exception."""
        self.entry = None if self.entry is None else self.entry.outer

    # ---- language model
    def enter_language(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        args, kwargs = by_name(module, args, kwargs)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if embeds is None and ids is None:
            return None
        entry = self.entry or Entry(alone=True)
        embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
        length, given, uses = embeds.shape[1], given_cache(kwargs), kwargs.get("use_cache")
        uses = module.config.use_cache if uses is None else uses
        cache = self.host.new_cache() if given is None and uses else given
        state = state_of(self.states, cache, len(embeds), length)
        if state is None:
            check_unknown(given, kwargs.get("attention_mask"), length)
        found = self._valid(entry, embeds, cache, state, kwargs, packs=given is None and not uses)
        if found is None:
            return None  # nothing of ours in this call: it stays as it is, bit for bit
        valid, visuals, facts = found
        if cache is not None and cache is not given:
            kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES} | {cache_keyword(): cache}
        entry.call = call = self._call(embeds, valid, cache, state, facts, kwargs)
        self.entry = entry
        call.positions.follow_length(self.host, self.plan, call.before + length)
        if visuals:
            inside = all(kind in entry.encoded for kind in visuals)
            for item in (*self.attends, *self.evicts):
                check_cache(cache, state, item, entry.prompt is not None and entry.prompt < length)
            check_prefill(self.host, cache, state, call.before, inside, kwargs, self.needs_tower)
            call.prompt = Prompt(self.host, self.plan, entry, visuals, valid, facts, call.positions, self.text_towers)
            if self.host.beside is not None and kwargs.get(self.host.beside[0]) is not None:
                call.prompt.beside = Beside.of(*(kwargs[name] for name in self.host.beside))
                kwargs = {**kwargs, **dict.fromkeys(self.host.beside)}
            call.prompt.questions = self.questions.of(call.prompt) if self.text_towers else None
            call.prompt.frame_scores = self.frame_scores
            if self.host.bidirectional:
                call.own_masks = own_masks(self.host, kwargs.get("attention_mask"), call.before)
            embeds = self._boundary(call.prompt, embeds)
            call.shortened(0)
        call.token = new_tokens(call, entry.prompt, self.attends, self.removing)
        call.given = call.segment[0]
        window = self.host.sliding_window()
        call.windowed = window is not None and not call.static and call.before + length > window
        kwargs = dict(kwargs)
        if ids is None:
            kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = call.positions.at(0)
        if call.prompt is not None and call.prompt.short:
            kwargs |= {name: take(kwargs[name], call.prompt.tokens.column) for name in self.host.per_token if kwargs.get(name) is not None}
        if call.reduced and call.own_masks:
            kinds = {self.host.layer_kind(i): i for i in reversed(range(len(self.blocks)))}
            kwargs["attention_mask"] = {kind: mask(self.host, call, i, embeds) for kind, i in kinds.items()}
        elif call.reduced:
            kwargs["attention_mask"] = columns(call, 0).to(torch.long)
        return args, kwargs

    def _valid(
        self, entry: Entry, embeds: Tensor, cache: Any, state: Decoding | None, kwargs: dict, packs: bool
    ) -> tuple[Tensor, dict[Kind, Tensor], dict[str, Any]] | None:
        """Returns the real tokens of a call `(B, q)` bool, its visual tokens by kind if the plan acts on them, and counts of its rows; None
        where the call is none of ours.

        Args:
            packs: the model would take positions that start again for another prompt of the same row, if there is no mask.
        """
        batch, length = embeds.shape[:2]
        mask, held = kwargs.get("attention_mask"), cache.get_seq_length() if cache is not None else 0
        if isinstance(mask, dict) and not (entry.alone or isinstance(entry.mask, dict)):
            mask = entry.mask  # the base model made masks of it, in keys that are left
        static, dropped = state is not None and state.static, 0 if state is None else state.dropped
        visuals = {kind: at for kind, at in entry.visuals.items() if length > 1 and at.shape == (batch, length)}
        if not visuals:
            return None if state is None else (own_columns(mask, embeds, held + dropped, held, static), {}, {})
        held = int(held)
        check_window(self.host, cache)
        valid = own_columns(mask, embeds, held + dropped, held, static)
        visuals = {kind: at & valid for kind, at in visuals.items()}
        packs = mask is None and (packs or self.host.language.backend.startswith("flash"))
        plain = None if self.host.bidirectional else only_padding(mask, valid, held)
        facts = count_rows(visuals, valid, kwargs.get("position_ids"), plain, packs)
        seen = [kind for kind, counts in facts["visual"].items() if any(counts)]
        acts = bool(seen) and bool(self.acts or self.needs_tower or entry.encoded)
        return None if not acts and state is None else (valid, {kind: visuals[kind] for kind in seen} if acts else {}, facts)

    def _call(self, embeds: Tensor, valid: Tensor, cache: Any, state: Decoding | None, facts: dict[str, Any], kwargs: dict) -> Call:
        """Makes the state of a forward before anything is removed."""
        (batch, length), count, device = embeds.shape[:2], len(self.blocks), embeds.device
        held = cache.get_seq_length() if cache is not None else 0
        held = int(held) if facts else held
        before, ids = held + (0 if state is None else state.dropped), kwargs.get("position_ids")
        if ids is None:
            ids = (torch.arange(length, device=device) + before)[None]
        return Call(
            cache=cache,
            state=state,
            static=state is not None and state.static,
            before=before,
            incoming=length,
            positions=Positions(ids, facts.get("gapless", True), list(state.shift) if state is not None else [None] * count),
            past=past_columns(state, kwargs.get("attention_mask"), before, held, batch, length, count, device),
            now=[valid] * count,
            now_where=[None] * count,
            segment=list(state.segment) if state is not None else [0] * count,
        )

    def _boundary(self, prompt: Prompt, embeds: Tensor) -> Tensor:
        if any(one.kept is not None for one in prompt.encoded.values()):
            embeds = prompt.remove_pruned_patches(embeds)
        for item in self.plan.at("boundary"):
            embeds = prompt.run_step(item, embeds)
        return embeds

    # ---- layers
    def _layer_hook(self, i: int) -> Any:
        removing = [s for s in self.plan.at("prefill", i) if s.step.action != "freeze"]
        frozen: PlanStep | None = next(iter(self.plan.at("prefill", i, action="freeze")), None)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.call
            if call is None:
                return None
            hidden = given = args[0] if args else kwargs["hidden_states"]
            prompt = call.prompt
            if prompt is not None and prompt.beside is not None:
                call.move(hidden.device)
                hidden = prompt.beside.added(i, hidden, prompt.tokens)
            if prompt is not None and removing:
                call.move(hidden.device)
                for item in removing:
                    prompt.rope = self._rope(call, i, hidden, kwargs)
                    hidden = prompt.run_step(item, hidden)
                if prompt.tokens.valid is not call.now[i]:
                    call.shortened(i)
            if call.token is not None:
                call.token.choose(i, self.attends)
            if prompt is not None:
                for read in [r for r in prompt.taps if r < i and self.last_use[r] <= i]:
                    del prompt.taps[read]
            freezes = frozen is not None and prompt is not None
            if not call.reduced and not freezes and hidden is given:
                return None
            kwargs = dict(kwargs)
            if call.reduced:
                if call.segment[i] != call.given or (
                    call.windowed and self.host.slides(i) and self.host.layer_kind(i) not in call.own_masks
                ):
                    kwargs["attention_mask"] = mask(self.host, call, i, hidden)
                kwargs["position_embeddings"] = self._rope(call, i, hidden, kwargs)
                # elsewhere only read to guess packed sequences; gaps would be misread
                kwargs["position_ids"] = call.positions.at(i).to(hidden.device) if self.host.reads_positions else None
            if freezes:
                hidden, kwargs = freeze.freeze(call, i, module, hidden, kwargs)
            if hidden is given:
                return args, kwargs
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _rope(self, call: Call, i: int, hidden: Tensor, kwargs: dict) -> Any:
        """Returns the rotary table of layer `i` for the tokens that are left."""
        return call.positions.rope_for(i, hidden, kwargs.get("position_embeddings"), self.host.layer_kind(i), self.host.rotary)

    def _refill_hook(self, i: int) -> Any:
        def hook(_module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> Any:
            prompt = None if self.call is None else self.call.prompt
            return None if prompt is None or i not in prompt.frozen else freeze.refill(prompt, i, output)

        return hook

    # ---- what steps read
    def _tap(self, i: int) -> Tap | None:
        prompt = None if self.call is None else self.call.prompt
        return None if prompt is None or prompt.probing else prompt.taps.setdefault(i, Tap(prompt.tokens.snapshot()))

    def _record(self, i: int) -> Any:
        def watcher(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            call, tap = self.call, self._tap(i)
            if call is None or call.prompt is None or tap is None:
                return
            if i in call.prompt.frozen:  # only text rows were queried; the others ask nothing
                hidden, text, _ = call.prompt.frozen[i]
                rows = text[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
                query = query.new_zeros(*query.shape[:2], hidden.shape[1], query.shape[-1]).scatter(2, rows, query)
            tap.query, tap.key, tap.value, tap.scaling = query, key, value, scaling
            real, size = columns(call, i), key.shape[2]
            if call.windowed and self.host.slides(i):
                tap.where, tap.window = all_columns(call, i)[:, -size:], self.host.sliding_window() or 0
            real = real[:, -size:]  # a sliding window may hold fewer keys than there were
            tap.first = real.shape[1] - call.now[i].shape[1]
            tap.keys = torch.nn.functional.pad(real, (0, size - real.shape[1]))  # a static cache is longer than its content

        return watcher

    def _record_activation(self, i: int) -> Any:
        def hook(_module: nn.Module, args: tuple) -> None:
            tap = self._tap(i)
            if tap is not None:
                tap.blocks["mlp_activation"] = args[0]

        return hook

    def _new_tokens(self) -> NewTokens | None:
        return None if self.call is None else self.call.token

    def _read_new_token(self, i: int) -> Any:
        def watcher(_module: nn.Module, query: Tensor, key: Tensor, _value: Tensor, scaling: float) -> None:
            tokens = self._new_tokens()
            if tokens is not None:
                tokens.note(i, query, key, scaling)

        return watcher

    # ---- leave
    def leave_language(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        entry, call = self.entry, self.call
        if entry is None or call is None:
            return
        self.entry = entry.outer if entry.alone else Entry(outer=entry.outer)
        if output is None:  # an exception inside
            return
        if call.cache is not None and call.reduced:
            check_returned(call, output, self.host.with_keys)
        if call.prompt is not None:
            for encoded in call.prompt.encoded.values():
                call.prompt.clock.extend(encoded.clock)
                call.prompt.checks = encoded.checks + call.prompt.checks
            if entry.late is not None and call.reduced:
                entry.late.fill(call)
            self.finished(call)
            if call.cache is not None and self.evicts:
                evict(call, self.host, max(item.step.layer for item in self.evicts))
        if call.cache is not None and (call.reduced or (call.prompt is not None and self.attends)):
            store(self.states, call, self.host)
            if call.prompt is not None and self.attends:
                begun = None if call.token is None else call.token.attending
                self.states[call.cache].attending = begun or Attending.of(self.attends, call)
