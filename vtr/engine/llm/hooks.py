"""The hooks on the base model, the language model and its layers: boundary, prefill, and decoding of a shortened cache."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine.llm import freeze
from vtr.engine.llm.cache import check_prefill, check_returned, past_columns, state_of, store
from vtr.engine.llm.call import CacheState, Call, move
from vtr.engine.llm.entry import Generating, brings_images, check_history, placeholders, repeats
from vtr.engine.llm.lifetime import spend
from vtr.engine.llm.masks import all_columns, columns, mask, only_padding, own_columns, split_segment, survey
from vtr.engine.llm.positions import Positions
from vtr.engine.llm.prefill import remove_pruned_patches, run_step
from vtr.engine.llm.prompt import begin
from vtr.engine.llm.text_tower import Questions, TextTower
from vtr.engine.signals import Tap, io_recorder
from vtr.hosts._host import Host
from vtr.hosts._taps import TAPS
from vtr.hosts._versions import CACHE_NAMES, cache_keyword, given_cache
from vtr.plans import Plan, PlanStep
from vtr.types import VtrError

ENCODED = "vtr_encoded"
"""Key under which the output of `get_image_features` carries what the tower leaves for the LLM."""


class LlmHooks:
    """Everything that happens from the base model's entry on. State is per thread and per call; what outlives a call follows its cache."""

    def __init__(self, host: Host, plan: Plan, finished: Any, questions: Questions | None = None) -> None:
        self.host, self.plan, self.finished, self.questions = host, plan, finished, questions or Questions()
        self.states: weakref.WeakKeyDictionary[Any, CacheState] = weakref.WeakKeyDictionary()
        self.calls: dict[int, Call] = {}
        self.late: dict[int, Any] = {}  # per thread, arguments of the outer model that get their values at the end of the LLM
        self.generating = Generating()
        self.layers = list(host.layers)
        self.acts = [s for s in plan.steps if s.step.stage in ("boundary", "prefill")]
        self.needs_tower = any(s.in_tower for s in plan.steps)
        self.watched = plan.signals(tower=False)
        sources = {n.source for s in plan.steps for n in s.step.needs if n.kind == "text_embedding"}
        self.text_towers = {source: TextTower(source) for source in sources if source}
        self.has_frozen = any(s.step.action == "freeze" for s in plan.steps)

    # one call per thread; a compiled step has no threads to tell apart
    @property
    def call(self) -> Call | None:
        return self.calls.get(0 if torch.compiler.is_compiling() else threading.get_ident())

    @call.setter
    def call(self, call: Call | None) -> None:
        key = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if call is None:
            self.calls.pop(key, None)
        else:
            self.calls[key] = call

    def install(self, undo: list[Any]) -> None:
        """Registers every hook; what `remove()` must undo is appended as it happens."""
        host = self.host
        undo += self.generating.install(host.model)
        undo.append(host.base.register_forward_pre_hook(self.enter_base, with_kwargs=True).remove)
        undo.append(host.base.register_forward_hook(self.leave_base, always_call=True).remove)
        undo.append(host.language_model.register_forward_pre_hook(self.enter_language, with_kwargs=True).remove)
        undo.append(host.language_model.register_forward_hook(self.leave_language, always_call=True).remove)
        for i, layer in enumerate(host.layers):
            undo.append(layer.register_forward_pre_hook(self._layer_hook(i), with_kwargs=True).remove)
            if self.plan.at("prefill", i, action="freeze"):
                undo.append(layer.register_forward_hook(self._thaw_hook(i), with_kwargs=True).remove)
                if host.attention_name(tower=False).startswith("flash"):
                    undo.append(TAPS.detour(getattr(layer, host.llm_attention), freeze.by_runs(lambda: self.call, i)))
        for i, signals in self.watched.items():
            layer, kinds = host.layers[i], {s.kind for s in signals}
            attention, mlp = getattr(layer, host.llm_attention), getattr(layer, host.llm_mlp)
            if kinds & {"rows", "q", "k", "v"}:
                undo.append(TAPS.watch(attention, self._record(i)))
            for kind, block in (("attention_io", attention), ("mlp_io", mlp)):
                if kind in kinds:
                    undo.append(block.register_forward_hook(io_recorder(kind, partial(self._tap, i)), with_kwargs=True).remove)
            if "mlp_activation" in kinds:
                undo.append(getattr(mlp, host.llm_down).register_forward_pre_hook(self._record_activation(i)).remove)

    def clear(self) -> None:
        """Forgets every cache and call; caches that were shortened refuse to go on without their reduction."""
        spend(self.states)
        self.states.clear()
        self.calls.clear()
        self.late.clear()

    # ---- base model: which positions of this call are visual
    def enter_base(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids: Any = args[0] if args else kwargs.get("input_ids")
        embeds: Any = kwargs.get("inputs_embeds")
        source = ids if ids is not None else embeds
        kwargs = dict(kwargs)
        positions = kwargs.pop("visual_positions", None)
        self.call = call = Call(outer=self.call)
        if source is None or source.shape[1] == 1:
            return args, kwargs
        if list(module.language_model.layers) != self.layers:
            raise VtrError("vtr: the model's layers were replaced since vtr.apply; remove() the reduction and apply it again")
        check_history(self.states, kwargs, source.shape[1])
        if positions is not None:
            call.visual = positions.bool()
        elif ids is None or brings_images(module, args, kwargs):
            call.visual = placeholders(self.host, module, ids, embeds, given_cache(kwargs))
        call.ids = ids if self.text_towers else None
        expand, call.prompt = self.generating.take(source.shape[1])
        call.expand = repeats(source, expand)
        late = self.late.get(threading.get_ident())
        call.answers = None if late is None else late.answers(*source.shape[:2])
        image = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        call.encoded = image.get(ENCODED) if isinstance(image, dict) else None
        return args, kwargs

    def leave_base(self, _module: Any, _args: tuple, _output: Any) -> None:
        """Also after an exception: the call that this one interrupted goes on."""
        self.call = None if self.call is None else self.call.outer

    # ---- language model
    def enter_language(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        embeds, call = kwargs.get("inputs_embeds"), self.call
        if embeds is None:
            return None
        if call is None:  # called without the base model
            call = Call(alone=True)
        kwargs = dict(kwargs)
        batch, length = embeds.shape[:2]
        given, use_cache, attention_mask = given_cache(kwargs), kwargs.get("use_cache"), kwargs.get("attention_mask")
        cache, uses = given, module.config.use_cache if use_cache is None else use_cache
        if cache is None and uses:
            cache = self.host.new_cache()
        call.state = state = state_of(self.states, cache, batch, length)
        call.static = state is not None and state.static
        held = cache.get_seq_length() if cache is not None else 0
        call.before = held + (state.dropped if state is not None else 0)
        call.prefill = length > 1 and call.visual is not None and call.visual.shape == (batch, length)
        stats = None
        if call.prefill:
            held = int(held)
            call.before = int(call.before)
            valid = own_columns(attention_mask, embeds, call.before, held, call.static)
            packs = attention_mask is None and (self.host.attention_name(tower=False).startswith("flash") or (given is None and not uses))
            stats = survey(call, valid, kwargs.get("position_ids"), only_padding(attention_mask, valid, held), packs)
            call.prefill = any(stats["visual"]) and bool(self.acts or self.needs_tower or call.encoded is not None)
        if not call.prefill and state is None:
            return None  # nothing of ours in this call: it stays as it is, bit for bit
        if not call.prefill:
            valid = own_columns(attention_mask, embeds, call.before, held, call.static)
        if cache is not None and cache is not given:
            kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES} | {cache_keyword(): cache}
        self.call = call
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = (torch.arange(length, device=embeds.device) + call.before)[None]
        count = len(self.host.layers)
        call.cache, call.incoming, call.reduced = cache, length, state is not None
        call.past = past_columns(call, attention_mask, held, batch, length, count)
        call.segment = list(state.segment) if state is not None else [0] * count
        call.now_where = [None] * count
        shift = state.shift if state is not None else [None] * count
        call.positions = Positions(ids, stats is None or stats["gapless"], list(shift))
        if call.prefill:
            assert stats is not None
            check_prefill(self.host, call, kwargs, self.needs_tower)
            call.fixed, call.text_width, call.unpadded = stats["fixed"], max(stats["text"]), stats["unpadded"]
            begin(self.host, call, valid, stats["visual"])
            assert call.sequence is not None
            call.questions = self.questions.of(call) if self.text_towers else None
            call.now = [call.sequence.valid] * count
            embeds = self._boundary(call, embeds)
            call.now, call.now_where = [call.sequence.valid] * count, [call.sequence.column] * count
        else:
            call.now = [valid] * count
        window = self.host.sliding_window()
        call.windowed = window is not None and not call.static and call.before + length > window
        kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = call.positions.at(0)
        if call.reduced:
            kwargs["attention_mask"] = columns(call, 0).to(torch.long)
        return args, kwargs

    def _boundary(self, call: Call, embeds: Tensor) -> Tensor:
        if call.encoded is not None and call.encoded.kept is not None:
            embeds = remove_pruned_patches(self.plan, call, call.encoded, embeds)
        for item in self.plan.at("boundary", side="after_projector"):
            embeds = run_step(self.host, self.plan, call, item, embeds, text_towers=self.text_towers)
        return embeds

    # ---- layers
    def _layer_hook(self, i: int) -> Any:
        removing = [s for s in self.plan.at("prefill", i) if s.step.action != "freeze"]
        frozen: PlanStep | None = next(iter(self.plan.at("prefill", i, action="freeze")), None)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.call
            if call is None or call.positions is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            given = hidden
            if call.prefill and removing:
                move(call, hidden.device)
                for item in removing:
                    hidden = run_step(self.host, self.plan, call, item, hidden, self._rope(call, i, hidden, kwargs))
                assert call.sequence is not None
                if call.sequence.valid is not call.now[i]:
                    behind = len(call.now) - i
                    call.now = call.now[:i] + [call.sequence.valid] * behind
                    call.now_where = call.now_where[:i] + [call.sequence.column] * behind
                    split_segment(call, i)
            if i - 1 in call.taps:
                del call.taps[i - 1]
            freezes = frozen is not None and call.prefill
            if not call.reduced and not freezes:
                return None
            kwargs = dict(kwargs)
            if call.reduced:
                if call.segment[i] != call.segment[0] or (call.windowed and self.host.slides(i)):
                    kwargs["attention_mask"] = mask(self.host, call, i, hidden)
                kwargs["position_embeddings"] = self._rope(call, i, hidden, kwargs)
                kwargs["position_ids"] = None  # only read to guess packed sequences; gaps would be misread
            if freezes:
                hidden, kwargs = freeze.freeze(self.host, call, i, module, hidden, kwargs)
            if hidden is given:
                return args, kwargs
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _rope(self, call: Call, i: int, hidden: Tensor, kwargs: dict) -> Any:
        """The rotary table of layer `i` for the tokens that are left."""
        assert call.positions is not None
        return call.positions.rope_for(i, hidden, kwargs.get("position_embeddings"), self.host.layer_kind(i), self.host.rotary)

    def _thaw_hook(self, i: int) -> Any:
        def hook(_module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> Any:
            call = self.call
            return None if call is None or i not in call.frozen else freeze.thaw(call, i, output)

        return hook

    def _tap(self, i: int) -> Tap | None:
        call = self.call
        if call is None or not call.prefill or call.sequence is None or call.probing:
            return None
        return call.taps.setdefault(i, Tap(call.sequence.snapshot()))

    def _record(self, i: int) -> Any:
        def watcher(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            call, tap = self.call, self._tap(i)
            if call is None or tap is None:
                return
            if i in call.frozen:  # only text rows were queried; the others ask nothing
                rows = call.frozen[i][1][:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
                query = query.new_zeros(*query.shape[:2], call.frozen[i][0].shape[1], query.shape[-1]).scatter(2, rows, query)
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

    # ---- leave
    def leave_language(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        call = self.call
        if call is None or call.positions is None:
            return
        self.call = call.outer if call.alone else Call(outer=call.outer)
        if output is None:  # an exception inside
            return
        if call.cache is not None and call.reduced:
            check_returned(call, output, len(self.layers))
        if call.prefill:
            if call.encoded is not None:
                call.clock.extend(call.encoded.clock)
                call.checks = call.encoded.checks + call.checks
            late = self.late.pop(threading.get_ident(), None)
            if late is not None and call.reduced:
                late.fill(call)
            self.finished(call)
        if call.cache is not None and call.reduced:
            store(self.states, call, self.host)
