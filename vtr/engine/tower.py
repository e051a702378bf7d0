"""The hooks on the vision tower: rows are shorter inside and full length at its border.

Survivors run through the later layers and the projector; then they are scattered into a full-length buffer whose other rows are NaN, so
that the family's own packing needs no change. The LLM side removes exactly those rows.
"""

from __future__ import annotations

import inspect
import threading
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine import checkpointing
from vtr.engine.encoding import Encoding, input_view
from vtr.engine.llm.entry import Encoded, placeholders, swap
from vtr.engine.llm.hooks import ENCODED, LlmHooks
from vtr.engine.llm.placeholders import framed
from vtr.engine.merge import merge_hooks
from vtr.engine.resize import embed_hooks, plan_resize
from vtr.engine.restore import restored, spread
from vtr.engine.signals import Tap, io_recorder
from vtr.hosts._layout import Kind, Layout, runs_of
from vtr.hosts._protocol import Host, closed_tower, feature_layers, pooled_tower
from vtr.hosts._taps import TAPS
from vtr.plans import Plan, PlanStep, signal_layer
from vtr.types import VtrError
from vtr.types.errors import WrongValue


class TowerHooks:
    """Everything that happens while images are encoded. State is per thread and per run."""

    def __init__(self, host: Host, plan: Plan, llm: LlmHooks) -> None:
        self.host, self.plan, self.llm = host, plan, llm
        self.runs: dict[int, Encoding] = {}
        self.watched = plan.signals(tower=True)
        self.layer_steps = [s for s in plan.steps if s.step.stage == "tower" and s.step.action != "restore"]
        self.edge_steps = plan.at("boundary", side="before_projector")
        self.inputs = plan.at("input")
        self.acts = bool(self.layer_steps or self.edge_steps or self.inputs)
        self.reader = next((s.name for s in plan.steps if s.in_tower or any(n.tower for n in s.step.needs)), "")
        self.last_use = plan.last_use(tower=True)
        later = [s.step for s in plan.steps if s.step.stage not in ("tower", "input")]
        self.kept_taps = {signal_layer(need, step) for step in later for need in step.needs if need.tower}

    def run(self) -> Encoding | None:
        """Returns the run of this thread, once its tower has begun."""
        run = self.runs.get(threading.get_ident())
        return run if run is not None and run.begun else None

    def install(self, undo: list[Any]) -> None:
        """Registers every hook; what `remove()` must undo is appended as it happens."""
        host = self.host
        undo += [self._wrap_encode(kind) for kind in host.encode]
        undo.append(host.tower.module.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
        for i, signals in self.watched.items():
            kinds = {s.kind for s in signals}
            layer = host.tower.blocks[i]
            attention, mlp = host.tower.attention(layer), host.tower.mlp(layer)
            if kinds - {"attention_io", "mlp_io"}:
                undo.append(TAPS.watch(attention, self._record(i, kinds)))
            for kind, block in (("attention_io", attention), ("mlp_io", mlp)):
                if kind in kinds:
                    undo.append(block.register_forward_hook(io_recorder(kind, partial(self._tap, i)), with_kwargs=True).remove)
            if not (self.acts or host.tower.by_views):  # what is seen must be told apart by segment
                undo.append(layer.register_forward_pre_hook(self._layer_hook(i), with_kwargs=True).remove)
        if not self.acts:
            return
        first = 0 if self.inputs else min((s.step.layer for s in self.layer_steps), default=len(host.tower.blocks))
        if not host.tower.by_views:
            first = min([first, *self.watched])
        if self.inputs:
            undo += embed_hooks(host, self.run)
        for i in range(first, len(host.tower.blocks)):
            undo += self._install_block(i)
        for item in self.plan.at("tower", action="restore"):
            layer = host.tower.blocks[item.step.layer - 1]
            undo.append(layer.register_forward_hook(partial(self._lengthen, item), prepend=True).remove)  # before transformers records it
        if not host.tower.edge:
            undo.append(host.projector.register_forward_pre_hook(self._edge).remove)
        undo += [module.register_forward_hook(self._restore).remove for module in host.tower.restore or (host.projector,)]

    def _install_block(self, i: int) -> list[Any]:
        """Registers the hooks of one block that runs short; returns what `remove()` must undo."""
        tower = self.host.tower
        block, run_attention = tower.blocks[i], tower.detour(i, self.run)
        undo = [block.register_forward_pre_hook(self._layer_hook(i), with_kwargs=True).remove]
        if run_attention is not None and (tower.by_views or any(s.step.proportional for s in self.layer_steps)):
            undo.append(TAPS.detour(tower.attention(block), run_attention))
        if items := self.plan.at("tower", i, at="mlp"):
            shorten = partial(self._shorten_all, items)
            undo += merge_hooks(block, tower.before_mlp(block), tower.mlp(block), i, self.run, shorten, tower.added)
        return undo

    def _wrap_encode(self, kind: Kind) -> Any:
        """Swaps the instance's `get_image_features`, or its like for videos, for one that lays the images out and files the result on the output."""
        host, base, name = self.host, self.host.base, self.host.encode[kind]
        original = getattr(base, name)
        signature = inspect.signature(original)

        @wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            me = threading.get_ident()
            outer = self.runs.get(me)
            if outer is not None and outer.kind != kind and not outer.begun:
                return original(*args, **kwargs)  # the method for videos calls the one for images
            given = {**kwargs, **signature.bind(*args, **kwargs).arguments}  # also what goes into **kwargs, by its own name
            self._check_features(given)
            if host.runs and (visual := self._placeholders()) is not None:
                given = {**given, "visual_runs": runs_of(visual)}
            layouts = host.layouts(kind, given)
            if host.as_frames:
                layouts = framed(host, self._counts(), layouts)
            self._check_open(kind, layouts)
            run = self.runs[me] = Encoding(host, self.plan, layouts, kind, given)
            try:
                output = original(*args, **kwargs)
            finally:
                self.runs.pop(me)
                if outer is not None:  # a hook of the user's encodes another image in the middle of this one
                    self.runs[me] = outer
            if not run.begun:
                return output
            taps = {i: tap for i, tap in run.taps.items() if i in self.kept_taps}
            pool = None if run.pooling is None else run.pooling.tokens
            encoded = Encoded(run.tokens.images, run.kept(), run.per_image(run.alive), taps, run.rows(), run.clock, run.checks, pool)
            if isinstance(output, dict):  # a key of the output, since accelerate rebuilds outputs from their keys
                output[ENCODED] = encoded
            if self.llm.entry is not None:
                self.llm.entry.encoded[run.shown] = encoded
            return output

        return swap(base, name, encode)

    def _placeholders(self) -> Tensor | None:
        """Returns the placeholders `(B, S)` bool of the prompt whose images are encoded, None where it is not known."""
        if self.llm.entry is not None:
            return self.llm.entry.visuals.get(self.host.shown("image"))
        prompt = self.llm.generating.prompt()
        if prompt is None:
            return None
        ids, embeds = (prompt, None) if prompt.ndim == 2 else (None, prompt)
        return placeholders(self.host, self.host.base, ids, embeds, None)["image"]

    def _counts(self) -> list[int]:
        """Returns the placeholders of every row of the prompt whose images are encoded.

        Raises:
            VtrError: it is not known.
        """
        visual = self._placeholders()
        if visual is None:
            raise VtrError(
                f"vtr: visuals='prompt' needs the prompt of the images, got features of {self.host.name} made alone; pass pixel_values"
            )
        return visual.sum(1).tolist()

    def _check_open(self, kind: Kind, layouts: list[Layout]) -> None:
        """Refuses an image for which the tower can be neither read nor cut, where a step does, and a video whose tower would be cut."""
        closed = next((layout.closed for layout in layouts if layout.closed), "")
        if closed and (self.acts or self.watched):
            raise closed_tower(self.reader, closed)
        cutter = self.plan.cutter(self.host.shown(kind))
        if kind == "video" and self.host.pooling is not None and cutter:
            raise pooled_tower(cutter, self.host.name)

    def _check_features(self, given: dict[str, Any]) -> None:
        asked = given.get("vision_feature_layer")
        if asked is None or not self.acts:
            return
        layers = feature_layers(asked, len(self.host.tower.blocks))
        if layers != self.host.tower.feature_layers:
            raise WrongValue(
                f"vtr: vision_feature_layer={asked} reads tower layers {layers}, but the reduction was applied for {self.host.tower.feature_layers}; "
                "set it in the config before vtr.apply"
            )

    def enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The tower begins: pixel values are known."""
        run = self.runs.get(threading.get_ident())
        if run is None:
            return
        pixels = args[0] if args else next(kwargs[name] for name in ("pixel_values", "hidden_states") if name in kwargs)
        inside = self.inputs or any(s.removes for s in self.layer_steps)
        if inside and checkpointing.wants_gradients(pixels):
            for layer in self.host.tower.blocks:
                checkpointing.refuse_switched_on(layer)
        run.start(pixels)
        for item in self.inputs:
            view = input_view(run, item, pixels)
            if view is not None:
                assert item.step.select is not None
                plan_resize(self.host, run, item.step.select(view), pixels)

    def _layer_hook(self, i: int) -> Any:
        steps = [s for s in self.plan.at("tower", i, at="layer") if s.step.action != "restore"]

        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            run = self.run()
            if run is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            for item in steps:
                hidden = self._shorten(run, item, hidden)
            for read in [r for r in run.taps if r < i and r not in self.kept_taps and self.last_use[r] <= i]:
                del run.taps[read]
            rest, kwargs = self.host.tower.arguments(i, hidden, args[1:], kwargs, run)
            return ((hidden, *rest), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _shorten(self, run: Encoding, item: PlanStep, hidden: Tensor) -> Tensor:
        """Runs a step on hidden states of a block."""
        before = self.host.tower.units(hidden, run)
        units = run.run_step(item, before)
        return hidden if units is before else self.host.tower.hidden(units, hidden, run)

    def _shorten_all(self, items: list[PlanStep], run: Encoding, hidden: Tensor) -> Tensor:
        for item in items:
            hidden = self._shorten(run, item, hidden)
        return hidden

    def _lengthen(self, item: PlanStep, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """Gives back all tokens that a method merged, at the output of a layer."""
        run, tower = self.run(), self.host.tower
        if run is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        units = tower.units(hidden, run)
        if item.step.select is None:
            full = spread(run, units)
            run.refill()
        else:
            views = restored(run, item, run.look_in_place(item, units), max(run.areas))
            run.refill()
            full = run.in_rows(views)
        run.tokens.images.memory.pop((item.method, run.shown), None)  # whole activations
        hidden = tower.hidden(full, hidden, run)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _edge(self, _module: nn.Module, args: tuple) -> tuple | None:
        """Runs the steps in front of the projector."""
        run = self.run()
        if run is None or not self.edge_steps or (run.pooling is not None and run.pooling.behind_projector):
            return None
        if self.host.tower.by_views:  # features, without prefix tokens
            hidden = args[0]
            for item in self.edge_steps:
                hidden = run.run_step(item, hidden)
        else:
            hidden = self._shorten_all(self.edge_steps, run, args[0])
        return (hidden, *args[1:])

    def _restore(self, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """Makes the features full length again, NaN where a patch is gone; the LLM's side removes those rows."""
        run = self.run()
        if run is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if self.host.tower.edge:
            hidden = self._shorten_all(self.edge_steps, run, hidden)
        if not (run.short or run.arranged):
            return None
        full = self.host.tower.full(hidden, run)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _tap(self, i: int) -> Tap | None:
        run = self.run()
        return None if run is None else run.taps.setdefault(i, Tap(run.places()))

    def _record(self, i: int, kinds: set) -> Any:
        tower = self.host.tower

        def watcher(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            run = self.run()
            made = None if run is None else tower.seen(i, query, key, value, run)
            tap = None if made is None else self._tap(i)
            if run is None or made is None or tap is None:
                return
            query, key, value = made
            tap.joins, tap.scaling = tower.joins, scaling
            if kinds & {"q", "pooled_row", "received"}:
                tap.query = query
            elif "cls_row" in kinds:
                tap.query = query[:, :, :1].clone()  # a slice would hold the whole tensor
            tap.key = key if kinds & {"cls_row", "pooled_row", "received", "k"} else None
            tap.value = value if kinds & {"v", "cls_v"} else None
            if not tower.by_views:
                tap.by_segments(*run.segments.pop(i), run.bias(0, torch.float32)[0] if run.sized else None)
                return
            if run.keys is not None:
                tap.keys = torch.nn.functional.pad(run.keys.repeat_interleave(tower.joins, 1), (tower.prefix_tokens, 0), value=True)
            if run.sized:
                bias = run.bias(0, torch.float32).repeat_interleave(tower.joins, 1)
                tap.bias = torch.nn.functional.pad(bias, (tower.prefix_tokens, 0))

        return watcher
