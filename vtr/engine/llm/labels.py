"""Arguments of the outer model that count tokens: labels, and positions in `logits_to_keep`, follow the tokens that are left.

The outer model uses them behind its language model, when it is known what is left. So it is given tensors of its own, which take their
values then: whatever its forward is, also one that was replaced, finds labels as long as its logits.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vtr.engine.llm.call import Call
from vtr.engine.llm.hooks import LlmHooks
from vtr.hosts._probe import by_name
from vtr.hosts._protocol import Host
from vtr.ops.labels import IGNORE, gathered_labels
from vtr.types import VtrError


class LabelHooks:
    """Hands the outer model copies of its `labels`, `shift_labels` and a tensor in `logits_to_keep`, and fills them once the LLM is done."""

    def __init__(self, host: Host, llm: LlmHooks) -> None:
        self.host, self.llm = host, llm

    def install(self, undo: list[Any]) -> None:
        """Registers the hooks; what `remove()` must undo is appended as it happens."""
        undo.append(self.host.model.register_forward_pre_hook(self.enter, with_kwargs=True).remove)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        args, kwargs = by_name(module, args, kwargs)
        labels, shifted, wanted = (kwargs.get(name) for name in ("labels", "shift_labels", "logits_to_keep"))
        if labels is None and shifted is None and not isinstance(wanted, Tensor):
            if not torch.compiler.is_compiling():  # a decode step stays one graph: threads cannot be told apart in one
                self.llm.late.pop(threading.get_ident(), None)
            return None
        kwargs, late = dict(kwargs), Late()
        if isinstance(labels, Tensor):
            kwargs["labels"] = late.labels = labels.clone()
        if isinstance(shifted, Tensor):
            kwargs["shift_labels"] = late.shifted = shifted.clone()
        if isinstance(wanted, Tensor):
            kwargs["logits_to_keep"] = late.positions = wanted.clone()
        self.llm.late[threading.get_ident()] = late
        return args, kwargs


def unshifted(labels: Tensor) -> Tensor:
    """Returns labels `(B, S)` that are at their own tokens, of labels that stand at the token before."""
    return torch.nn.functional.pad(labels, (1, 0), value=IGNORE)[:, :-1]


class Late:
    """Tensors that the outer model holds already and that get their values when the language model is done.

    Attributes:
        labels: `(B, S)` int64, or None; becomes as long as the tokens that are left.
        shifted: the same moved left by one, the label of the next token at every token.
        positions: `(T,)` int64 positions of the prompt, or None; become positions among the tokens that are left.
    """

    def __init__(self) -> None:
        self.labels: Tensor | None = None
        self.shifted: Tensor | None = None
        self.positions: Tensor | None = None

    def answers(self, batch: int, length: int) -> Tensor | None:
        """Labelled columns `(B, q)` bool of a call, where the labels are of its size."""
        labels = unshifted(self.shifted) if self.labels is None and self.shifted is not None else self.labels
        return labels != IGNORE if labels is not None and labels.shape == (batch, length) else None

    @torch.no_grad()
    def fill(self, call: Call) -> None:
        """Gives the tensors the values that belong to what a call has left.

        Raises:
            VtrError: positions of removed tokens, or positions that differ between rows.
        """
        assert call.prompt is not None
        column, valid = call.prompt.tokens.column, call.prompt.tokens.valid
        if self.labels is not None:
            short = gathered_labels(self.labels, column, valid)
            self.labels.set_(short)  # type: ignore[call-overload]
        if self.shifted is not None:
            short = gathered_labels(unshifted(self.shifted), column, valid)
            last = self.shifted.expand(len(column), -1).gather(1, column[:, -1:].to(self.shifted.device))
            behind = torch.where(valid[:, -1:].to(last.device), last, IGNORE)
            self.shifted.set_(torch.cat([short[:, 1:], behind], 1))  # type: ignore[call-overload]
        if self.positions is not None:
            asked = self.positions.to(column.device)
            asked = torch.where(asked < 0, asked + call.incoming, asked)
            found = (column[:, None] == asked[:, None]) & valid[:, None]  # (B, T, S)
            place = found.to(torch.uint8).argmax(-1)
            if not bool(found.any(-1).all()) or not bool((place == place[:1]).all()):
                raise VtrError(
                    "vtr: logits_to_keep names tokens that were removed, or that are at different places in the rows of the batch; give a number "
                    "of last tokens, or gather from all logits with reduction.report().positions"
                )
            self.positions.copy_(place[0])
