"""Merging between attention and MLP of a tower layer, with hooks only.

The second norm gets merged tokens, so the MLP runs short. Its output is padded so that the layer's residual addition gives the merged
result in the first rows, and the layer's exit is cut to them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtr.engine.encoding import run_tower_step
from vtr.hosts._host import Host
from vtr.plans import Plan


def instead_of(before: Tensor, wanted: Tensor) -> Tensor:
    """What a residual branch has to give `(V, S, D)` so that adding it to `before (V, S, D)` leaves `wanted (V, S', D)`, zeros behind."""
    full = -before
    full[:, : wanted.shape[1]] += wanted
    return full


def merge_hooks(host: Host, plan: Plan, i: int, current: Any) -> list[Any]:
    """Hooks of layer `i`; `current()` is the run of this thread. Returns what `remove()` must undo."""
    items = plan.at("tower", i, at="mlp")
    layer = host.tower_layers[i]

    def before_norm(_module: nn.Module, args: tuple) -> tuple | None:
        run = current()
        if run is None or run.sequence is None:
            return None
        merged = args[0]
        for item in items:
            merged = run_tower_step(host, plan, run, item, merged, host.prefix_tokens)
        if merged is args[0]:
            return None
        run.pending[i] = (args[0], merged)
        return (merged,)

    def after_mlp(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        run = current()
        if run is None or i not in run.pending:
            return None
        before, merged = run.pending[i]
        return instead_of(before, merged + output)

    def leave(_module: nn.Module, _args: tuple, output: Any) -> Any:
        run = current()
        if run is None or i not in run.pending:
            return None
        short = run.pending.pop(i)[1].shape[1]
        return (output[0][:, :short], *output[1:]) if isinstance(output, tuple) else output[:, :short]

    return [
        getattr(layer, host.tower_norms[1]).register_forward_pre_hook(before_norm).remove,
        getattr(layer, host.tower_mlp).register_forward_hook(after_mlp).remove,
        layer.register_forward_hook(leave, prepend=True).remove,  # before transformers records the layer's output
    ]
