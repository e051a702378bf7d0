"""Makes plans: from what the user gave to one that was checked against the model."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from torch import nn

from vtr.checks import check_frame_scores, check_plan, check_positions, check_question, check_stage, check_step, check_steps
from vtr.hosts._dense import DenseHost
from vtr.hosts._protocol import Host, host_of, with_frames
from vtr.ops.precision import outside_autocast
from vtr.plans import Change, Plan, PlanStep, in_model_order, planned
from vtr.registry import create_method, method_from
from vtr.types import Geometry, Method, Step, View, VtrError, check_choices, steps_of_method, with_named_signals
from vtr.types.errors import WrongType, WrongValue, as_refusals

Visuals = Literal["each", "prompt"]
"""Whether images are images, or those of a prompt the frames of one video."""
Methods = str | Method | Plan | Sequence[Method] | Mapping[str, Any]
"""What a user may give: a registry name, a method, a plan, a list of methods, or what `to_dict` of a method or a plan returned."""


def plan(
    model: nn.Module,
    method: str | Method | Plan | Sequence[Method] | Mapping[str, Any],
    *,
    processor: Any = None,
    question: str | Sequence[str] | None = None,
    frame_scores: Any = None,
    visuals: Visuals = "each",
    **settings: Any,
) -> Plan:
    """Returns what `vtr.reduced` and `vtr.apply` would do to `model`, checked in the same way; nothing is done to the model.

    `print(plan)` shows its steps and what they leave of an image, `plan.counts(n)` the visual tokens at every layer for an image of `n`.

    Args:
        model: as for `reduced`; a model without weights, made on torch's meta device, will do.
        method, processor, question, frame_scores, visuals, **settings: as for `reduced`.

    Raises:
        ValueError: unknown method or setting (closest names), budget or layer out of range.
        TypeError: an argument of the wrong kind.
        VtrError: this model or attention backend cannot do it.

    Example:
        >>> plan = vtr.plan(model, [vtr.DivPrune(keep=192), vtr.FastV(keep=64)])
        >>> print(plan)
        >>> json.dump(plan.to_dict(), file)  # and back: vtr.plan(model, json.load(file))
    """
    found = make_plan(host_for(model, visuals), method, settings)
    check_question(found, question, processor)
    check_frame_scores(found, frame_scores)
    return found


def check_visuals(given: str, who: str = "vtr.apply: ") -> Visuals:
    """Returns what was given.

    Raises:
        ValueError: it is neither `each` nor `prompt`.
    """
    if given not in get_args(Visuals):
        raise WrongValue(f"{who}visuals must be 'each' or 'prompt', got {given!r}")
    return cast(Visuals, given)


def host_for(model: nn.Module, visuals: Visuals) -> Host | DenseHost:
    """Returns the host of a model, whose images are frames where `visuals` says so.

    Raises:
        ValueError: it is neither `each` nor `prompt`.
        VtrError: no host knows the model, or its images are no frames.
    """
    visuals, host = check_visuals(visuals), host_of(model)
    if visuals == "each":
        return host
    if isinstance(host, DenseHost):
        raise VtrError(f"vtr.apply: visuals='prompt' is about the images of a prompt, and {host.name!r} has no LLM; leave it out")
    return with_frames(host)


def make_plan(host: Host | DenseHost, method: Methods, settings: Mapping[str, Any] | None = None) -> Plan:
    """Resolves what the user gave into a plan for a host, and refuses what cannot be done.

    Raises:
        TypeError: not a name, a method, a plan or a list of methods.
        ValueError: unknown names or settings, layers or budgets out of range.
        VtrError: this host or its attention backend cannot.
    """
    methods = [one.resolved(host.renumber, host.has_video) for one in methods_of(method, settings or {})]
    changes = method.changes if isinstance(method, Plan) else ()
    geometry = host.geometry()
    items: list[PlanStep] = []
    for number, one in enumerate(methods):
        check_stage(one, host)
        check_choices(one, one.name)
        steps = _steps(one, geometry, changes)
        for step in steps:
            check_step(one.name, step, host, geometry)
        check_positions(one, host)
        items += planned(steps, number, one)
    made = Plan(tuple(methods), in_model_order(items), host.llm_layers, replace(geometry, patch_norm=None), changes)
    check_plan(made, host)
    return made


def _remade(methods: tuple[Method, ...], geometry: Geometry | None, llm_layers: int, changes: tuple[Change, ...]) -> Plan:
    """Returns a plan that was checked before; arguments are as for `Plan`."""
    numbered = [] if geometry is None else [(number, one, _steps(one, geometry, changes)) for number, one in enumerate(methods)]
    items = [item for number, one, steps in numbered for item in planned(steps, number, one)]
    return Plan(methods, in_model_order(items), llm_layers, geometry, changes)


def _written(plan: Plan) -> tuple[Callable[..., Plan], tuple[Any, ...]]:
    """Returns of what copies and pickles make a plan again: its steps hold functions, which cannot be written down."""
    return _remade, (plan.methods, plan.geometry, plan.llm_layers, plan.changes)


copyreg.pickle(Plan, _written)


def _steps(method: Method, geometry: Geometry, changes: tuple[Change, ...]) -> list[Step]:
    """Returns the steps of a method, changed and ready to run.

    Raises:
        TypeError, ValueError: they are no steps, or the method refuses the model.
    """
    with steps_of_method(method.name), as_refusals():
        steps = check_steps(method.name, method.steps(geometry))
    for change in changes:
        steps = check_steps(method.name, change(method, tuple(steps)))
    return [s if s.select is None else _with(s, with_named_signals(method.name, outside_autocast(s.select))) for s in steps]


def _with(step: Step, select: Callable[[View], Any]) -> Step:
    """The step with another function, without checking all of it anew."""
    twin = copy(step)
    object.__setattr__(twin, "select", select)
    return twin


def methods_of(method: Methods, settings: Mapping[str, Any]) -> list[Method]:
    """Returns the methods of what the user gave.

    Raises:
        TypeError: not a name, a method, a plan or a list of methods.
        ValueError: unknown names or settings, or settings beside what has its own.
    """
    if isinstance(method, str):
        return [create_method(method, **settings)]
    if isinstance(method, Method):
        if settings:
            raise WrongValue(
                f"vtr.apply: settings live on the method instance, got {', '.join(settings)} beside it; "
                "use dataclasses.replace or vtr.create_method"
            )
        return [method]
    if isinstance(method, Plan):
        given: Any = list(method.methods)
    elif isinstance(method, Mapping):
        given = method.get("methods", [method])
    else:
        given = method
    if isinstance(given, (list, tuple)) and given and all(isinstance(m, (Method, Mapping)) for m in given):
        if settings:
            raise WrongValue(f"vtr.apply: the settings of a plan live on its methods, got {', '.join(settings)} beside a list")
        return [m if isinstance(m, Method) else method_from(m) for m in given]
    name = next((m for m in given if isinstance(m, str)), None) if isinstance(given, (list, tuple)) else None
    hint = "see vtr.list_methods()" if name is None else f"a plan holds instances: give vtr.create_method({name!r}, ...) for each name"
    raise WrongType(f"vtr.apply: method must be a name, a method or a non-empty list of methods, got {method!r}; {hint}")
