"""Merging between attention and MLP of a block, with hooks only.

The norm in front of the MLP gets merged tokens, so the MLP runs short. Its output is padded so that the block's residual addition gives the
merged result in the first places, and the block's output is cut to them. Where a block scales that output before it adds it, the sum is made
here, and what the block makes of it is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine.shrinking import Shrinking


def merge_hooks(
    block: nn.Module,
    norm: nn.Module,
    branch: nn.Module,
    i: int,
    current: Callable[[], Any],
    shorten: Callable[[Any, Tensor], Tensor],
    added: Callable[[Any, Tensor], Tensor] | None = None,
) -> list[Callable[[], None]]:
    """Registers the hooks of block `i`; returns the functions that remove them.

    Args:
        block: the block, whose output is hidden states, alone or first in a tuple.
        norm: its module that gets the residual stream behind the attention.
        branch: its module whose output is added to that stream.
        added: `(block, output) -> what the block adds for an output of `branch``; None = the output itself.
        current: returns the run of this thread, or None.
        shorten: `(run, hidden) -> hidden`, the merge; the same tensor where there is nothing to merge.
    """

    def before_norm(_module: nn.Module, args: tuple) -> tuple | None:
        run: Shrinking | None = current()
        if run is None:
            return None
        merged = shorten(run, args[0])
        if merged is args[0]:
            return None
        run.pending[i] = (args[0], merged)
        return (merged,)

    def after_branch(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        run: Shrinking | None = current()
        if run is None or i not in run.pending:
            return None
        before, merged = run.pending[i]
        if added is None:
            return _instead_of(before, merged + output)
        run.pending[i] = (before, merged + added(block, output))
        return torch.zeros_like(before)

    def leave(_module: nn.Module, _args: tuple, output: Any) -> Any:
        run: Shrinking | None = current()
        if run is None or i not in run.pending:
            return None
        hidden, wanted = output[0] if isinstance(output, tuple) else output, run.pending.pop(i)[1]
        hidden = hidden[..., : wanted.shape[-2], :] if added is None else wanted
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return [
        norm.register_forward_pre_hook(before_norm).remove,
        branch.register_forward_hook(after_branch).remove,
        block.register_forward_hook(leave, prepend=True).remove,  # before transformers records the block's output
    ]


def _instead_of(before: Tensor, wanted: Tensor) -> Tensor:
    """Returns what a residual branch has to give so that adding it to `before (..., S, D)` leaves `wanted (..., S', D)`, zeros behind."""
    full = -before
    full[..., : wanted.shape[-2], :] += wanted
    return full
