"""`with vtr.reduced(model, method):` installs hooks on a model, routes Views to methods, and restores the model exactly."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from vtr.apply.compiled import forget_compiled
from vtr.apply.report import Report
from vtr.types import Method, VtrError

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


class Reduction:
    """A reduction that is installed on a model. Use it as a context manager, or call `remove()`.

    Args:
        model: a pretrained model with a host.
        method: registry name, method instance, or list of instances (a plan).
        history: keep the reports of all prefills in `reports`, not only the last.
        processor, question: where a method needs the question as text, see `apply`.
        settings: settings of the method, when `method` is a name.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method | Sequence[Method],
        *,
        history: bool = False,
        processor: Any = None,
        question: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        from vtr.apply.dense import DenseHooks
        from vtr.apply.labels import LabelHooks
        from vtr.apply.llm import LlmHooks
        from vtr.apply.plan import make_plan
        from vtr.apply.text_tower import Questions
        from vtr.apply.tower import TowerHooks
        from vtr.hosts._dense import DenseHost
        from vtr.hosts._host import host_of

        self.host: Any = host_of(model)
        holder = _ACTIVE.get(self.host.base)
        if holder is not None and holder() is not None:
            raise VtrError("vtr.apply: this model is reduced already; remove() that reduction first, or give one list of methods as a plan")
        self.plan = make_plan(self.host, method, settings)
        questions = Questions(question, processor)
        questions.check(self.plan)
        self.history = history
        self.reports: list[Report] = []
        self._warned = False
        self._undo: list[Any] = []
        self._state: Any
        installed: tuple[Any, ...]
        if isinstance(self.host, DenseHost):
            self._state = DenseHooks(self.host, self.plan, self._append)
            installed = (self._state,)
        else:
            self._state = LlmHooks(self.host, self.plan, self._finished, questions)
            installed = (self._state, TowerHooks(self.host, self.plan, self._state), LabelHooks(self.host, self._state))
        try:
            for hooks in installed:
                hooks.install(self._undo)
        except BaseException:
            self.remove()
            raise
        forget_compiled()
        _ACTIVE[self.host.base] = weakref.ref(self)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of the plan, with their settings."""
        return self.plan.methods

    def remove(self) -> None:
        """Restores the model exactly; reports stay valid, and a KV cache shortened by it raises `VtrError` when a model goes on from it.

        Compiled code is dropped, as by `apply`. A second call does nothing.
        """
        installed = bool(self._undo)
        while self._undo:
            self._undo.pop()()
        self._state.clear()
        if installed:
            forget_compiled()
        holder = _ACTIVE.get(self.host.base)
        if holder is not None and holder() is self:
            del _ACTIVE[self.host.base]

    def report(self) -> Any:
        """What the last prefill with images really did (`Report`), or the last batch of a ViT without an LLM (`DenseReport`).

        Raises:
            VtrError: no prompt with an image was run under this reduction yet.
        """
        if not self.reports:
            raise VtrError(
                "Reduction.report: no prompt with an image has been run under this reduction yet; call generate or forward first"
            )
        return self.reports[-1]

    def __enter__(self) -> Reduction:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def _append(self, report: Any) -> None:
        if not self.history:
            self.reports.clear()
        self.reports.append(report)

    def _finished(self, call: Any) -> None:
        from vtr.apply.report import warn_small_images

        self._append(Report(self.plan, call))
        self._warned = self._warned or warn_small_images(self.plan, call)


def apply(
    model: nn.Module,
    method: str | Method | Sequence[Method],
    *,
    history: bool = False,
    processor: Any = None,
    question: str | Sequence[str] | None = None,
    **settings: Any,
) -> Reduction:
    """Reduces the visual tokens of `model` until `Reduction.remove()`.

    Code that `torch.compile` has made in this process is dropped and made anew at the next call, here and at `remove()`: torch does not see
    that hooks came or went.

    Args:
        model: a pretrained model whose `config.model_type` or class has a host (`vtr.registry.list_hosts()`), or a module around one such
            ViT; it is not copied and only hooked.
        method: registry name (`vtr.list_methods()`), method instance, or a list of instances that composes in model order.
        history: keep the reports of all prefills.
        processor: the model's processor, for methods that need the question as text: it decodes what stands behind the image.
        question: the question itself instead, as one string or one per prompt; what the authors of such methods use.
        **settings: of the method, when it is given by name: `keep=64`, `keep_ratio=0.1`, ...

    Raises:
        ValueError: unknown method or setting (closest names), budget or layer out of range.
        TypeError: an argument of the wrong kind.
        VtrError: this model or attention backend cannot do it, or the model is reduced already.
    """
    return Reduction(model, method, history=history, processor=processor, question=question, **settings)


def reduced(model: nn.Module, method: str | Method | Sequence[Method], **options: Any) -> Reduction:
    """`apply` (same arguments) for a `with` block: the model is restored at its end, also after an exception.

    Example:
        >>> with vtr.reduced(model, "fastv", keep=64) as reduction:
        ...     out = model.generate(**inputs)
        >>> reduction.report()
    """
    return Reduction(model, method, **options)


__all__ = ["Reduction", "Report", "apply", "reduced"]
