"""From what the user gave to a plan that was checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vtr.checks import check_backend, check_budgets, check_names, check_step, methods_of, steps_of
from vtr.checks_restoring import check_dense, check_restoring
from vtr.hosts._dense import DenseHost
from vtr.hosts._host import Host
from vtr.ops.precision import outside_autocast
from vtr.plans import Plan, PlanStep
from vtr.types import Method, Step, VtrError, check_choices, with_named_signals


def make_plan(host: Host | DenseHost, method: str | Method | Sequence[Method], settings: dict[str, Any]) -> Plan:
    """Resolves what the user gave into a plan, and refuses what cannot be done.

    Raises:
        TypeError: not a name, a method or a list of methods.
        ValueError: unknown names or settings, layers or budgets out of range.
        VtrError: this host or its attention backend cannot.
    """
    methods = [one.resolved(host.renumber) for one in methods_of(method, settings)]
    geometry = host.geometry()
    items: list[PlanStep] = []
    for number, one in enumerate(methods):
        if one.stages and not set(one.stages) & set(host.stages):
            raise VtrError(
                f"{one.name}: acts at stage {one.stages[0]!r}, but host {host.name!r} has no LLM; use a tower method such as 'expedit' or 'tome'"
            )
        check_choices(one, one.name)
        steps = [
            s if s.select is None else replace(s, select=with_named_signals(one.name, outside_autocast(s.select)))
            for s in steps_of(one, geometry)
        ]
        removals = [s for s in steps if s.action in ("remove", "merge", "input")]
        for step in steps:
            check_step(one.name, step, host, geometry)
            last = bool(removals) and step is removals[-1]
            items.append(PlanStep(step, number, one.name, one.position_ids or "keep", one.newlines, last))
        if one.position_ids == "renumber" and not host.renumber:
            raise VtrError(f"{one.name}: position_ids='renumber' has no meaning for the rotary positions of {host.name}; leave it out")
    order = {"input": 0, "tower": 1, "boundary": 2, "prefill": 3}
    items.sort(key=lambda s: (_model_order(s.step, order), s.step.layer if s.step.stage != "boundary" else 0, s.step.at == "mlp"))
    plan = Plan(tuple(methods), tuple(items), host.llm_layers)
    check_budgets(plan, host)
    check_backend(plan, host)
    check_restoring(plan)
    if isinstance(host, DenseHost):
        check_dense(plan, host)
    else:
        check_names(host, plan)
    return plan


def _model_order(step: Step, order: dict[str, int]) -> float:
    return 1.5 if step.side == "before_projector" and step.stage == "boundary" else order[step.stage]
