"""The hooks on a ViT without an LLM: shorter inside, full length wherever its outputs are read.

A tapped block hands out restored tokens; the block behind it is given the short ones again. Only instances are touched.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine import checkpointing
from vtr.engine.dense_run import DenseRun
from vtr.engine.llm.entry import swap
from vtr.engine.merge import merge_hooks
from vtr.hosts._dense import DenseHost, Grid
from vtr.planning import make_plan
from vtr.plans import Plan
from vtr.types import Method, VtrError


class DenseHooks:
    """Everything that happens while images run through a dense ViT. State is per thread and per run."""

    def __init__(self, host: DenseHost, plan: Plan, finished: Callable[[Any], None]) -> None:
        self.host, self.finished = host, finished
        self.methods: tuple[Method, ...] = plan.methods
        self.first_plan = plan
        self.plans: dict[Grid, Plan] = {} if host.dynamic else {host.patch_grid: plan}
        self.asked: dict[int, frozenset[int]] = {}
        self.runs: dict[int, DenseRun] = {}
        self.outer: dict[int, list[tuple[frozenset[int] | None, DenseRun | None]]] = {}  # of calls that another one interrupts
        self.swapped = self.warned = False

    @property
    def _me(self) -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()  # a compiled run has no threads to tell apart

    def plan(self, grid: Grid) -> Plan:
        """The plan for inputs of this token grid, without steps where `keep` is more than the grid has; refuses what does not fit it."""
        if grid not in self.plans:
            small = [m for m in self.methods if m.budget is not None and (m.budget.keep or 0) > grid[0] * grid[1]]
            self.plans[grid] = Plan(self.methods, (), 0) if small else make_plan(self.host.at(grid), self.first_plan)
            if small and not self.warned:
                self.warned = True
                warnings.warn(
                    f"{small[0].name}: keep={small[0].keep} is more than the {grid[0] * grid[1]} visual tokens of an image; all its tokens stay",
                    stacklevel=3,
                )
        return self.plans[grid]

    def install(self, undo: list[Any]) -> None:
        """Registers every hook; what `remove()` must undo is appended as it happens."""
        host, blocks = self.host, list(self.host.blocks)
        undo.append(host.patches.register_forward_hook(self._begin).remove)
        for name, taps in host.entries.items():
            if name == "forward":
                undo.append(host.model.register_forward_pre_hook(self._asked_by_forward(taps), with_kwargs=True).remove)
                undo.append(host.model.register_forward_hook(lambda *_: self._end_call(), always_call=True).remove)
            else:
                undo.append(swap(host.model, name, self._asking(getattr(host.model, name), taps)))
        swaps = list(self._swaps())
        self.swapped = bool(swaps)
        for owner, name, value in swaps:
            undo.append(swap(owner, name, value))
        for i, block in enumerate(blocks):
            undo.append(block.register_forward_pre_hook(self._enter(i), with_kwargs=True).remove)
            undo.append(block.register_forward_hook(self._leave(i), prepend=True).remove)  # before transformers records the output
            undo += self._merge_hooks(i)

    def _swaps(self) -> Iterator[tuple[Any, str, Any]]:
        """What the host changes in the blocks that run on fewer tokens, for as long as the reduction is installed."""
        plan, geometry = self.first_plan, self.host.geometry()
        for item in plan.at("tower", action="merge"):
            ends = [s.step.layer for s in plan.at("tower", action="restore") if s.method == item.method]
            known = geometry.patch_grid if geometry.fixed_grid else None
            small = item.step.grid(known) if item.step.grid is not None and known is not None else None
            yield from self.host.swaps(item.name, item.step.layer, min(ends, default=len(self.host.blocks)), small)

    def clear(self) -> None:
        """Forgets every run."""
        for run in list(self.runs.values()):
            self._end(run)
        self.asked.clear()
        self.outer.clear()

    def _begin_call(self, taps: Sequence[int] | None) -> None:
        """Notes which outputs a call of this thread reads, and what it interrupts: a hook may run the model in the middle of a call."""
        me = self._me
        self.outer.setdefault(me, []).append((self.asked.get(me), self.runs.pop(me, None)))
        self.asked[me] = self._blocks(taps)

    def _end_call(self) -> None:
        """Goes on with the call that this one interrupted, also after an exception."""
        me = self._me
        self.asked.pop(me, None)
        run = self.runs.get(me)
        if run is not None:
            self._end(run)
        calls = self.outer.get(me)
        asked, run = calls.pop() if calls else (None, None)
        if asked is not None:
            self.asked[me] = asked
        if run is not None:
            self.runs[me] = run
        if not calls:
            self.outer.pop(me, None)

    def _end(self, run: DenseRun) -> None:
        for key in [key for key, value in self.runs.items() if value is run]:
            del self.runs[key]

    # ---- which outputs a call reads
    def _asked_by_forward(self, taps: Any) -> Any:
        def enter(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
            self._begin_call(taps(kwargs))

        return enter

    def _asking(self, original: Any, taps: Any) -> Any:
        signature = inspect.signature(original)

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self._begin_call(taps(bound.arguments))
            try:
                return original(*args, **kwargs)
            finally:
                self._end_call()

        return call

    def _blocks(self, taps: Sequence[int] | None) -> frozenset[int]:
        count = len(self.host.blocks)
        return frozenset(range(count) if taps is None else taps) | {count - 1}

    # ---- the run
    def _begin(self, _module: nn.Module, args: tuple, output: Tensor) -> None:
        me = self._me
        if output.ndim != 4:
            raise VtrError(f"{self.host.name}: has no token grid: its patches come as {tuple(output.shape)}, not (B, D, rows, cols)")
        if checkpointing.wants_gradients(args[0]):
            checkpointing.refuse_checkpoint()
        old = self.runs.get(me)
        if old is not None:
            self._end(old)  # an early end of the call before, or an exception in it
        grid = (int(output.shape[-2]), int(output.shape[-1]))
        taps = self.asked.get(me)
        if taps is None:  # a method fetched before the reduction, or one that the host does not know: it may read any block
            taps = self._blocks(None if self.host.entries else ())
        self.runs[me] = DenseRun(self.host, self.plan(grid), grid, args[0], taps)

    def _enter(self, i: int) -> Any:
        block = self.host.blocks[i]

        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            run = self.runs.get(self._me)
            if run is None:
                checkpointing.refuse_backward()
                return None
            hidden = given = args[0] if args else kwargs["hidden_states"]
            run.trained = checkpointing.wants_gradients(hidden)
            if run.trained:
                checkpointing.refuse_checkpoint()
                if self.swapped:
                    checkpointing.refuse_switched_on(block)
            if run.inside is not None:
                short, shown = run.inside
                if hidden is not shown:
                    raise VtrError(
                        f"{self.host.name}: something changes hidden states between blocks {i - 1} and {i}; a reduction cannot follow"
                    )
                if given.requires_grad and not short.requires_grad:  # a checkpoint of another library hands out what alone has gradients
                    raise VtrError(checkpointing.MESSAGE)
                hidden, run.inside = short, None
            steps = run.plan.at("tower", i, action="merge", at="layer")
            if steps:
                hidden = self._shorten(run, steps, hidden)
            run.lengths.append(hidden[..., 0].numel() // run.images - self.host.prefix_tokens)
            rest = args[1:]
            if run.short:
                rest, kwargs = self.host.arguments(run, rest, kwargs)
                point = self.host.merge_point
                if run.masked and point is not None and point.mask and point.attention is None:
                    bias = run.mask(hidden.dtype)
                    rest, kwargs = ((bias, *rest[1:]), kwargs) if rest else (rest, {**kwargs, point.mask: bias})
            if hidden is given and not run.short:
                return None
            return ((hidden, *rest), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        return hook

    def _shorten(self, run: DenseRun, steps: Sequence[Any], hidden: Tensor) -> Tensor:
        tokens = before = self.host.units(hidden, run)
        if not run.short:
            run.begin(tokens, self.host.row_grid(run.grid))
        for item in steps:
            tokens = run.run_step(item, tokens)
        return hidden if tokens is before else self.host.hidden(tokens, hidden, run)

    def _leave(self, i: int) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
            run = self.runs.get(self._me)
            if run is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            ends = len(run.plan.at("tower", i + 1, action="restore"))  # torch 2.11 cannot compile bool() of a list
            final = ends > 0 or i == len(self.host.blocks) - 1
            if run.short and (final or i in run.shown):
                full = self.host.hidden(run.lengthen(self.host.units(hidden, run)), hidden, run, full=True)
                if final:
                    run.short = False
                else:
                    run.inside = (hidden, full)
                hidden = full
            if i == len(self.host.blocks) - 1:
                if not torch.compiler.is_compiling():
                    self.finished(run)
                self._end(run)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    # ---- merging between attention and MLP of a block
    def _merge_hooks(self, i: int) -> list[Any]:
        point, block = self.host.merge_point, self.host.blocks[i]
        if point is None:
            return []

        def see_keys(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            run = self.runs.get(self._me)
            if run is None:
                checkpointing.refuse_backward()
            elif run.plan.at("tower", i, at="mlp"):
                if run.trained:
                    checkpointing.refuse_checkpoint()
                output = output if point.project is None else point.project(block, output)
                run.keys[i] = output if output.ndim == 4 else output.unflatten(-1, (point.heads, -1)).transpose(1, 2)

        def merge(run: DenseRun, hidden: Tensor) -> Tensor:
            steps = run.plan.at("tower", i, at="mlp")
            merged = self._shorten(run, steps, hidden) if steps else hidden
            run.keys.pop(i, None)
            return merged

        def weigh(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            run = self.runs.get(self._me)
            if run is None or not (run.short and run.masked):
                return None
            return args, {**kwargs, str(point.mask): run.mask(args[0].dtype).flatten(1)}

        weighing = [] if point.attention is None else [point.attention(block).register_forward_pre_hook(weigh, with_kwargs=True).remove]
        if not self.first_plan.at("tower", at="mlp"):
            return weighing
        return [
            *weighing,
            point.keys(block).register_forward_hook(see_keys).remove,
            *merge_hooks(block, point.norm(block), point.branch(block), i, lambda: self.runs.get(self._me), merge),
        ]
