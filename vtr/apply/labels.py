"""Labels follow the survivors: the loss of a shortened sequence is computed on gathered labels."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vtr.apply.llm import LlmHooks
from vtr.hosts._host import Host

IGNORE = -100
"""Label that transformers' losses skip."""


class LabelHooks:
    """Takes `labels=` off the call of the outer model and computes its loss once the survivors are known."""

    def __init__(self, host: Host, llm: LlmHooks) -> None:
        self.host, self.llm = host, llm
        self.waiting: dict[int, tuple[Tensor, dict]] = {}

    def install(self, undo: list[Any]) -> None:
        """Registers the hooks; what `remove()` must undo is appended as it happens."""
        model = self.host.model
        if hasattr(model, "loss_function"):
            undo.append(model.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
            undo.append(model.register_forward_hook(self.leave, with_kwargs=True).remove)

    def enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if kwargs.get("labels") is None and torch.compiler.is_compiling():
            return None  # a decode step stays one graph: threads cannot be told apart in one
        self.llm.survivors.pop(threading.get_ident(), None)
        self.waiting.pop(threading.get_ident(), None)
        if kwargs.get("labels") is None:
            return None
        kwargs = dict(kwargs)
        self.waiting[threading.get_ident()] = (kwargs.pop("labels"), kwargs)
        return args, kwargs

    def leave(self, module: Any, _args: tuple, _kwargs: dict, output: Any) -> Any:
        if not self.waiting:
            return None
        labels, kwargs = self.waiting.pop(threading.get_ident(), (None, {}))
        if labels is None:
            return None
        survivors = self.llm.survivors.pop(threading.get_ident(), None)
        logits = output[0] if isinstance(output, tuple) else output.logits
        if survivors is not None:
            column, valid = (t.to(labels.device) for t in survivors)
            begun = valid & (valid.cumsum(1) > 1)  # nothing real predicts the first token of a row
            labels = torch.where(begun, labels.gather(1, column), IGNORE)
        extra = {"num_items_in_batch": kwargs["num_items_in_batch"]} if "num_items_in_batch" in kwargs else {}
        loss = module.loss_function(logits=logits, labels=labels, vocab_size=self.host.language_model.config.vocab_size, **extra)
        if isinstance(output, tuple):
            return (loss, *output)
        output.loss = loss
        return output
