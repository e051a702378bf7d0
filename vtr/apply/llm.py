"""The hooks on the base model, the language model and its layers: boundary, prefill, and decoding of a shortened cache."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtr.apply import freeze
from vtr.apply.call import CacheState, Call, Encoded, move
from vtr.apply.columns import columns, mask, reconcile, split_segment, store, survey, valid_tokens
from vtr.apply.entry import check_history, note_beams, placeholders, repeats
from vtr.apply.lifetime import spend
from vtr.apply.plan import Plan, PlanStep
from vtr.apply.positions import Positions
from vtr.apply.prefill import begin, run_step, shorten
from vtr.apply.signals import Tap, io_recorder
from vtr.apply.text_tower import Questions, TextTower
from vtr.hosts._host import Host
from vtr.hosts._taps import TAPS
from vtr.hosts._versions import cache_keyword, given_cache
from vtr.types import VtrError

ENCODED = "vtr_encoded"
"""Key under which the output of `get_image_features` carries what the tower leaves for the LLM."""


class LlmHooks:
    """Everything that happens from the base model's entry on. State is per thread and per call; what outlives a call follows its cache."""

    def __init__(self, host: Host, plan: Plan, finished: Any, questions: Questions | None = None) -> None:
        self.host, self.plan, self.finished, self.questions = host, plan, finished, questions or Questions()
        self.states: weakref.WeakKeyDictionary[Any, CacheState] = weakref.WeakKeyDictionary()
        self.calls: dict[int, Call] = {}
        self.survivors: dict[int, tuple[Tensor, Tensor]] = {}  # per thread, original columns left by the last call, for labels
        self.beams: dict[int, int] = {}  # per thread, how often generate() is about to repeat every prompt
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
        undo.append(note_beams(host.model, self.beams))
        undo.append(host.base.register_forward_pre_hook(self.enter_base, with_kwargs=True).remove)
        undo.append(host.language_model.register_forward_pre_hook(self.enter_language, with_kwargs=True).remove)
        undo.append(host.language_model.register_forward_hook(self.leave_language, with_kwargs=True).remove)
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
        self.survivors.clear()

    # ---- base model: which positions of this call are visual
    def enter_base(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids: Any = args[0] if args else kwargs.get("input_ids")
        embeds: Any = kwargs.get("inputs_embeds")
        source = ids if ids is not None else embeds
        kwargs = dict(kwargs)
        positions = kwargs.pop("visual_positions", None)
        if source is None:
            return args, kwargs
        self.call = call = Call()
        if source.shape[1] == 1:
            return args, kwargs
        if list(module.language_model.layers) != self.layers:
            raise VtrError("vtr: the model's layers were replaced since vtr.apply; remove() the reduction and apply it again")
        check_history(self.states, kwargs, source.shape[1])
        if positions is not None:
            call.visual = positions.bool()
        else:
            call.visual = placeholders(self.host, module, ids, embeds, given_cache(kwargs))
        call.ids = ids if self.text_towers else None
        call.expand = repeats(source, self.beams.pop(threading.get_ident(), 1))
        image = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        call.encoded = image.get(ENCODED) if isinstance(image, dict) else None
        return args, kwargs

    # ---- language model
    def enter_language(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        embeds = kwargs.get("inputs_embeds")
        call = self.call
        if embeds is None:
            return None
        if call is None:
            call = self.call = Call()
        kwargs = dict(kwargs)
        batch, length = embeds.shape[:2]
        cache, use_cache = given_cache(kwargs), kwargs.get("use_cache")
        if cache is None and (module.config.use_cache if use_cache is None else use_cache):
            cache = kwargs[cache_keyword()] = self.host.new_cache()
        state = self.states.get(cache) if cache is not None else None
        if state is not None and not (state.static and length == 1):  # a compiled decode step must not ask the device
            state = reconcile(self.states, cache, state)
        call.prefill = length > 1 and call.visual is not None and call.visual.shape == (batch, length)
        stats = None
        if call.prefill:
            valid = valid_tokens(kwargs.get("attention_mask"), embeds, state)
            stats = survey(call, valid, kwargs.get("position_ids"))
            call.prefill = any(stats["visual"]) and bool(self.acts or self.needs_tower or call.encoded is not None)
        if not call.prefill and state is None:
            self.call = None  # nothing of ours in this call: it stays as it is, bit for bit
            return None
        if not call.prefill:
            valid = valid_tokens(kwargs.get("attention_mask"), embeds, state)
        past = (cache.get_seq_length() if cache is not None else 0) + (state.dropped if state is not None else 0)
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = (torch.arange(length, device=embeds.device) + past)[None]
        count = len(self.host.layers)
        call.cache, call.incoming, call.reduced = cache, length, state is not None
        call.static = state is not None and state.static
        call.past = list(state.valid) if state is not None else [None] * count
        call.segment = list(state.segment) if state is not None else [0] * count
        shift = state.shift if state is not None else [None] * count
        call.positions = Positions(ids, stats is None or stats["gapless"], list(shift))
        if call.prefill:
            assert stats is not None
            self._check_prefill(call, state, past, length)
            call.fixed, call.text_width, call.unpadded = stats["fixed"], max(stats["text"]), stats["unpadded"]
            begin(self.host, call, valid, stats["visual"])
            assert call.sequence is not None
            call.questions = self.questions.of(call) if self.text_towers else None
            call.now = [call.sequence.valid] * count
            embeds = self._boundary(call, embeds)
            call.now = [call.sequence.valid] * count
        else:
            call.now = [valid] * count
        kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = call.positions.at(0)
        if call.reduced:
            kwargs["attention_mask"] = columns(call, 0).to(torch.long)
        return args, kwargs

    def _check_prefill(self, call: Call, state: CacheState | None, past: Any, length: int) -> None:
        if call.static:
            raise VtrError("vtr: a second prefill on a static cache that holds a reduction is not supported; use a dynamic cache")
        window = self.host.sliding_window()
        if window is not None and int(past) + length > window:
            raise VtrError(
                f"vtr: a prompt of {int(past) + length} tokens is longer than the sliding window of {window}, where distance counts removed "
                "tokens; use a model without sliding-window layers"
            )
        if self.needs_tower and call.encoded is None:
            raise VtrError("vtr: a tower method needs images encoded inside the reduction; pass pixel_values, not features made before")
        if torch.is_grad_enabled() and any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in self.layers):
            raise VtrError("vtr: gradient checkpointing runs layers twice, which a reduction cannot follow; switch it off")

    def _boundary(self, call: Call, embeds: Tensor) -> Tensor:
        if call.encoded is not None and call.encoded.kept is not None:
            embeds = self._bury(call, call.encoded, embeds)
        for item in self.plan.at("boundary", side="after_projector"):
            embeds = run_step(self.host, self.plan, call, item, embeds, text_towers=self.text_towers)
        return embeds

    def _bury(self, call: Call, encoded: Encoded, embeds: Tensor) -> Tensor:
        """Removes the tombstones of patches that the tower removed."""
        images, sequence = call.images, call.sequence
        assert images is not None and sequence is not None and encoded.kept is not None
        kept = encoded.kept.to(embeds.device).unflatten(0, (-1, images.slots))
        kept = kept[torch.tensor(images.source).to(embeds.device, non_blocking=True)].flatten()
        gid = sequence.gid()
        last = [s for s in self.plan.steps if s.in_tower][-1]
        counts = [encoded.counts[s] for s in images.source]
        embeds = shorten(call, embeds, (gid < 0) | kept[gid.clamp_min(0)], counts, last)
        # left filler may be a tombstone; it is masked, but NaN would pass through a masked value
        filler = ~sequence.valid & (sequence.gid_of.gather(1, sequence.column) >= 0)
        return embeds.masked_fill(filler[..., None], 0.0)

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
                    rope = call.positions.rope_for(i, hidden, kwargs["position_embeddings"], self.host.language_model.rotary_emb)
                    call.positions.rope = rope
                    hidden = run_step(self.host, self.plan, call, item, hidden, rope)
                assert call.sequence is not None
                if call.sequence.valid is not call.now[i]:
                    call.now = call.now[:i] + [call.sequence.valid] * (len(call.now) - i)
                    split_segment(call, i)
            if i - 1 in call.taps:
                del call.taps[i - 1]
            freezes = frozen is not None and call.prefill
            if not call.reduced and not freezes:
                return None
            kwargs = dict(kwargs)
            if call.reduced:
                if call.segment[i] != call.segment[0]:
                    kwargs["attention_mask"] = mask(self.host, call, i, hidden)
                kwargs["position_embeddings"] = call.positions.rope_for(
                    i, hidden, kwargs["position_embeddings"], self.host.language_model.rotary_emb
                )
                kwargs["position_ids"] = None  # only read to guess packed sequences; gaps would be misread
            if freezes:
                hidden, kwargs = freeze.freeze(self.host, call, i, module, hidden, kwargs)
            if hidden is given:
                return args, kwargs
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

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
            real = columns(call, i)
            tap.first = real.shape[1] - call.now[i].shape[1]
            tap.keys = torch.nn.functional.pad(real, (0, key.shape[2] - real.shape[1]))  # a static cache is longer than its content

        return watcher

    def _record_activation(self, i: int) -> Any:
        def hook(_module: nn.Module, args: tuple) -> None:
            tap = self._tap(i)
            if tap is not None:
                tap.blocks["mlp_activation"] = args[0]

        return hook

    # ---- leave
    def leave_language(self, _module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> None:
        call, self.call = self.call, None
        if call is None or call.positions is None:
            return
        if call.prefill:
            if call.encoded is not None:
                call.clock.extend(call.encoded.clock)
            if call.reduced and call.sequence is not None:
                self.survivors[threading.get_ident()] = (call.sequence.column, call.sequence.valid)
            self.finished(call)
        if call.cache is not None and call.reduced:
            store(self.states, call, len(self.layers))
