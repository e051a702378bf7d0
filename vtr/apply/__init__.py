"""`with vtr.reduced(model, method):` installs hooks on a model, routes Views to methods, and restores the model exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtr.apply.reduction import Reduction, remove
from vtr.apply.report import Report
from vtr.types import Method


def reduced(
    model: nn.Module,
    method: str | Method | Sequence[Method],
    *,
    history: bool = False,
    processor: Any = None,
    question: str | Sequence[str] | None = None,
    **settings: Any,
) -> Reduction:
    """Reduces the visual tokens of `model` inside a `with` block; the model is restored at its end, also after an exception.

    Method, settings and model are checked at once; nothing is changed before the block begins. The same object may be entered again, and
    it decorates functions: each call then runs inside a block of its own.

    Code that `torch.compile` has made in this process is dropped and made anew at the next call, when a block begins and when it ends:
    torch does not see that hooks came or went.

    Args:
        model: a pretrained model whose `config.model_type` or class has a host (`vtr.registry.list_hosts()`), or a module around one such
            model (PEFT, DDP, `torch.compile`, ...); it is not copied and only hooked. Copies of it made inside the block are whole models.
            Give what you call, or a wrapper of it: the head around an inner model does not know that labels have to be shorter.
        method: registry name (`vtr.list_methods()`), method instance, or a list of instances that composes in model order.
        history: keep the reports of all prefills of a block, not only the last.
        processor: the model's processor, for methods that need the question as text: it decodes what stands behind the image.
        question: the question itself instead, as one string or one per prompt; what the authors of such methods use.
        **settings: of the method, when it is given by name: `keep=64`, `keep_ratio=0.1` (of the image's original tokens), ...

    Raises:
        ValueError: unknown method or setting (closest names), budget or layer out of range.
        TypeError: an argument of the wrong kind.
        VtrError: this model or attention backend cannot do it; at the beginning of the block, the model is reduced already.

    Example:
        >>> with vtr.reduced(model, "fastv", keep=64) as reduction:
        ...     out = model.generate(**inputs)
        >>> reduction.report()
    """
    return Reduction(model, method, history=history, processor=processor, question=question, **settings)


def apply(
    model: nn.Module,
    method: str | Method | Sequence[Method],
    *,
    history: bool = False,
    processor: Any = None,
    question: str | Sequence[str] | None = None,
    **settings: Any,
) -> Reduction:
    """Reduces the visual tokens of `model` from now until `Reduction.remove()`, or `vtr.remove(model)`.

    Args:
        model, method, history, processor, question, **settings: as for `reduced`.

    Raises:
        ValueError: unknown method or setting (closest names), budget or layer out of range.
        TypeError: an argument of the wrong kind.
        VtrError: this model or attention backend cannot do it, or the model is reduced already.
    """
    reduction = Reduction(model, method, history=history, processor=processor, question=question, **settings)
    reduction._install()
    return reduction


__all__ = ["Reduction", "Report", "apply", "reduced", "remove"]
