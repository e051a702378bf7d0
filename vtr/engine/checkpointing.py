"""Gradient checkpointing runs a layer again in backward, when the call that shortened its input is over: refused before that can happen."""

from __future__ import annotations

import sys
from types import FrameType

import torch
import torch.utils.checkpoint
from torch import Tensor

from vtr.types import VtrError

MESSAGE = "vtr: gradient checkpointing runs layers twice, which a reduction cannot follow; switch it off"


def wants_gradients(value: Tensor) -> bool:
    """Returns whether gradients may be asked for behind a layer that gets `value`.

    The reentrant kind of checkpoint runs forward with gradients off; they only flow through it when its input requires them.
    """
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or value.requires_grad)


def refuse_checkpoint() -> None:
    """Refuses to go on where `torch.utils.checkpoint` has called, for a library or for the user, around one layer or the whole model.

    transformers calls it inside a layer since 5.23, so that hooks on the layer itself are outside and need no refusal.

    Raises:
        VtrError: some caller is `torch.utils.checkpoint`.
    """
    names = vars(torch.utils.checkpoint)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is names:
            raise VtrError(MESSAGE)
        frame = frame.f_back


def refuse_backward() -> None:
    """Refuses a layer that runs in backward without a call of its model: checkpointing by another library.

    Raises:
        VtrError: gradients are being computed.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise VtrError(MESSAGE)


def refuse_switched_on(layer: torch.nn.Module) -> None:
    """Refuses a layer that transformers will run again, where even what the layer itself does depends on the reduction.

    Raises:
        VtrError: it is switched on, in training.
    """
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        raise VtrError(MESSAGE)
