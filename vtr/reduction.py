"""`with vtr.reduced(model, method):` installs hooks on a model, routes Views to methods, and restores the model exactly."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from functools import partial
from typing import Any

from torch import nn

from vtr.engine.compiled import forget_compiled
from vtr.engine.copies import CleanCopies, refuse_replicas
from vtr.engine.llm.frame_scores import FrameScores
from vtr.engine.release import check_release
from vtr.planning import Visuals
from vtr.plans import Plan
from vtr.report import Report
from vtr.types import Method, VtrError
from vtr.types.errors import WrongType

_LOCK = threading.RLock()  # reductions are installed and removed one at a time
_INSTALLED: weakref.WeakSet[Reduction] = weakref.WeakSet()  # each is kept alive by the model that it is installed on


class Reduction(ContextDecorator):
    """A reduction of one model, good for any number of `with` blocks or calls of a function that it decorates.

    Everything is checked when it is made, against the model as it is then, and again when it is installed. It acts while it is installed:
    inside a `with` block, or from `install()` to `remove()`.

    Args:
        model: a pretrained model with a host.
        method: registry name, method instance, list of instances, plan, or what `to_dict` of a method or a plan returned.
        history: keep the reports of all prefills of a block in `reports`, not only the last.
        processor, question, frame_scores, visuals: see `reduced`.
        settings: settings of the method, when `method` is a name.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method | Plan | Sequence[Method] | Mapping[str, Any],
        *,
        history: bool = False,
        processor: Any = None,
        question: str | Sequence[str] | None = None,
        frame_scores: FrameScores | None = None,
        visuals: Visuals = "each",
        **settings: Any,
    ) -> None:
        from vtr.planning import methods_of

        self._model, self._method = model, method if isinstance(method, Plan) and not settings else methods_of(method, settings)
        self._question, self._processor, self._frame_scores, self._visuals = question, processor, frame_scores, visuals
        self.history = history
        self.reports: list[Report] = []
        self._warned = False
        self._undo: list[Callable[[], None]] = []
        self._state: Any = None
        self._blocks = 0  # `with` blocks that are open
        self._prepare()

    def _prepare(self) -> None:
        """Looks at the model and makes the plan for it, with all checks."""
        from vtr.checks import check_frame_scores, check_question
        from vtr.planning import host_for, make_plan

        self.host: Any = host_for(self._model, self._visuals)
        self.plan = make_plan(self.host, self._method)
        check_question(self.plan, self._question, self._processor)
        check_frame_scores(self.plan, self._frame_scores)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are reductions of their own, of the copied model, that are not installed."""
        given = {"question": self._question, "processor": self._processor, "frame_scores": self._frame_scores, "visuals": self._visuals}
        return partial(Reduction, history=self.history, **given), (self._model, self._method)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of the plan, with their settings."""
        return self.plan.methods

    @property
    def installed(self) -> bool:
        """Whether the model is reduced by it now."""
        return bool(self._undo)

    def __repr__(self) -> str:
        state = "installed" if self.installed else "not installed"
        return f"Reduction({self.host.name}: {self.plan.described()}; {self.plan.summary()}; {state})"

    def install(self) -> Reduction:
        """Reduces the model until `remove()`, and begins new reports; does nothing while it is installed.

        Raises:
            VtrError: the model, a part of it, or a model around it is reduced already.
        """
        with _LOCK:
            if not self.installed:
                self._prepare()
                self._install()
            return self

    def _install(self) -> None:
        """Installs what was prepared just now."""
        with _LOCK:
            check_release()
            _check_free(self.host)
            self.reports, self._warned = [], False
            copies = CleanCopies(self.host.model, self)
            try:
                for hooks in self._hooks():
                    hooks.install(self._undo)
                self._undo.append(refuse_replicas(self.host.model))
                self._undo.append(copies.follow())
            except BaseException:
                self.remove()
                raise
            forget_compiled()
            _INSTALLED.add(self)

    def _hooks(self) -> tuple[Any, ...]:
        """Makes what is installed, with a state of its own for this time."""
        from vtr.engine.dense import DenseHooks
        from vtr.engine.direct import DirectCalls
        from vtr.engine.llm.hooks import LlmHooks
        from vtr.engine.llm.labels import LabelHooks
        from vtr.engine.llm.text_tower import Questions
        from vtr.engine.tower import TowerHooks
        from vtr.hosts._dense import DenseHost

        if isinstance(self.host, DenseHost):
            self._state = DenseHooks(self.host, self.plan, lambda run: self._append(Report.of_encoder(run)))
            return (self._state,)
        questions = Questions(self._question, self._processor)
        self._state = LlmHooks(self.host, self.plan, self._finished, questions, self._frame_scores)
        tower, labels = TowerHooks(self.host, self.plan, self._state), LabelHooks(self.host, self._state)
        return self._state, tower, labels, DirectCalls(self.host.model)

    def remove(self) -> None:
        """Restores the model exactly; reports stay valid, and a KV cache shortened by it raises `VtrError` when a model goes on from it.

        Compiled code is dropped, as by `apply`. A second call does nothing. It can be entered again.
        """
        with _LOCK:
            installed = self.installed
            while self._undo:
                self._undo.pop()()
            if self._state is not None:
                self._state.clear()
            _INSTALLED.discard(self)
            if installed:
                forget_compiled()

    def report(self) -> Report:
        """Returns what the last prefill with images, or the last batch of a ViT without an LLM, really did.

        Raises:
            VtrError: no prompt with an image was run in this block yet, or a method kept another number of tokens than it was asked for.
        """
        if not self.reports:
            raise VtrError(
                "Reduction.report: no prompt with an image has been run under this reduction yet; call generate or forward first"
                + ("" if self.installed else ", inside its `with` block")
            )
        report = self.reports[-1]
        report.check()
        return report

    def __enter__(self) -> Reduction:
        with _LOCK:
            self.install()
            self._blocks += 1
        return self

    def __exit__(self, *_error: object) -> None:
        with _LOCK:
            self._blocks -= 1
            if self._blocks == 0:
                self.remove()

    def __call__(self, function: Any) -> Any:
        """Decorates a function: each call runs inside a block of its own, a nested call inside the outer one's.

        Raises:
            TypeError: not a function, or one whose body runs only after it has returned.
        """
        if not callable(function) or isinstance(function, type):
            raise WrongType(f"vtr.reduced: decorates a function, got {type(function).__name__}; call the model itself inside `with`")
        late = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(is_(one) for is_ in late for one in (function, type(function).__call__)):
            name = getattr(function, "__name__", function)
            raise WrongType(f"vtr.reduced: {name!r} is a generator or async, whose body runs later; use `with` inside it")
        return super().__call__(function)

    def _append(self, report: Report) -> None:
        if not self.history:
            self.reports.clear()
        self.reports.append(report)

    def _finished(self, call: Any) -> None:
        from vtr.report import warn_small_images

        self._append(Report.of_prompt(self.plan, call))
        self._warned = self._warned or warn_small_images(self.plan, call)


def reduced(
    model: nn.Module,
    method: str | Method | Plan | Sequence[Method] | Mapping[str, Any],
    *,
    history: bool = False,
    processor: Any = None,
    question: str | Sequence[str] | None = None,
    frame_scores: FrameScores | None = None,
    visuals: Visuals = "each",
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
        method: registry name (`vtr.list_methods()`), method instance, list of instances that act in model order, plan (`vtr.plan`), or
            what `to_dict` of a method or a plan returned, also after JSON or YAML.
        history: keep the reports of all prefills of a block, not only the last.
        processor: the model's processor, for methods that need the question as text: it decodes what stands behind the image.
        question: the question itself instead, as one string or one per prompt; what the authors of such methods use.
        frame_scores: for methods that ask for the relevance of frames: one row of scores per video in the order of the prompts, `(V, T)` or a
            list, or a function `frames of every video -> that`, asked at every prompt.
        visuals: `each` = images are images; `prompt` = the images of a prompt are the frames of one video, for models that take images only.
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
    return Reduction(
        model, method, history=history, processor=processor, question=question, frame_scores=frame_scores, visuals=visuals, **settings
    )


def apply(
    model: nn.Module,
    method: str | Method | Plan | Sequence[Method] | Mapping[str, Any],
    *,
    history: bool = False,
    processor: Any = None,
    question: str | Sequence[str] | None = None,
    frame_scores: FrameScores | None = None,
    visuals: Visuals = "each",
    **settings: Any,
) -> Reduction:
    """Reduces the visual tokens of `model` from now until `Reduction.remove()`, or `vtr.remove(model)`.

    Args:
        model, method, history, processor, question, frame_scores, visuals, **settings: as for `reduced`.

    Raises:
        ValueError: unknown method or setting (closest names), budget or layer out of range.
        TypeError: an argument of the wrong kind.
        VtrError: this model or attention backend cannot do it, or the model is reduced already.
    """
    reduction = Reduction(
        model, method, history=history, processor=processor, question=question, frame_scores=frame_scores, visuals=visuals, **settings
    )
    reduction._install()
    return reduction


def remove(model: nn.Module) -> None:
    """Ends every reduction of `model`, of a part of it, or of a model around it; does nothing where there is none.

    Args:
        model: what was given to `vtr.apply` or `vtr.reduced`; a wrapper around it will do.
    """
    if not isinstance(model, nn.Module):
        raise WrongType(f"vtr.remove: model must be a torch module, got {type(model).__name__}")
    for reduction in reductions_of(model):
        reduction.remove()


def reductions_of(model: nn.Module) -> list[Reduction]:
    """Returns the installed reductions whose model has a module in common with `model`."""
    from vtr.hosts._wrappers import modules_of

    others = [reduction for reduction in list(_INSTALLED) if reduction.installed]
    ours = modules_of(model).keys() if others else set()
    return [reduction for reduction in others if not ours.isdisjoint(modules_of(reduction.host.model))]


def _check_free(host: Any) -> None:
    for other in reductions_of(host.model):
        if other.host.base is host.base:
            raise VtrError(
                f"vtr.apply: this model is reduced already, by {other.plan.described()}; remove() that reduction first, or vtr.remove(model), or "
                "give one list of methods as a plan"
            )
        raise VtrError(
            f"vtr.apply: {host.name} shares modules with {other.host.name}, which is reduced already, by {other.plan.described()}; a part and its "
            "whole cannot be reduced apart: give the whole one list of methods as a plan"
        )
