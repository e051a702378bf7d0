"""Methods that merge tokens in the tower and give all of them back: the rest of the model sees the full grid and never knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine.encoding import Encoding, row_view
from vtr.hosts._host import Host
from vtr.plans import Plan, PlanStep
from vtr.types import VtrError


def restore_hooks(host: Host, plan: Plan, current: Any) -> list[Any]:
    """Hooks of all merging and restoring steps of such methods; `current()` is the run of this thread. Returns what undoes them."""
    undo = []
    for item in (s for s in plan.steps if s.method in plan.restoring):
        if item.step.action == "restore":
            layer = host.tower_layers[item.step.layer - 1]
            hook = layer.register_forward_hook(_lengthen(host, plan, item, current), prepend=True)  # before transformers records the output
        else:
            layer = host.tower_layers[item.step.layer]
            hook = layer.register_forward_pre_hook(_shorten(host, plan, item, current), with_kwargs=True)
        undo.append(hook.remove)
    return undo


def _shorten(host: Host, plan: Plan, item: PlanStep, current: Any) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run: Encoding | None = current()
        if run is None or run.sequence is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        prefix, tokens = hidden[:, : host.prefix_tokens], hidden[:, host.prefix_tokens :]
        if tokens.shape[1] != run.area or run.short:
            raise VtrError(
                f"{item.name}: needs the whole token grid of {host.patch_grid[0]} x {host.patch_grid[1]}, got {tokens.shape[1]} tokens; it must "
                "come before methods that remove tokens in the tower"
            )
        started = run.clock.start(hidden.device)
        assert item.step.select is not None
        selection = item.step.select(row_view(host, plan, run, item, tokens))
        run.clock.stop(started, hidden.device)
        hidden = torch.cat([prefix, selection.tokens.to(hidden.dtype)], 1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook


def _lengthen(host: Host, plan: Plan, item: PlanStep, current: Any) -> Any:
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        run: Encoding | None = current()
        if run is None or run.sequence is None:
            return None
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        prefix, tokens = hidden[:, : host.prefix_tokens], hidden[:, host.prefix_tokens :]
        started = run.clock.start(hidden.device)
        assert item.step.select is not None
        full = item.step.select(row_view(host, plan, run, item, tokens))
        run.clock.stop(started, hidden.device)
        run.images.memory.pop(item.method, None)  # whole activations
        hidden = torch.cat([prefix, full.to(hidden.dtype)], 1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook
