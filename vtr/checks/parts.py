"""Refuses parts of a model that are compiled by themselves: hooks inside such a part do not know the call that it is in."""

from __future__ import annotations

from typing import Any

from vtr.hosts._protocol import Host
from vtr.hosts._towers import Stack
from vtr.plans import Plan, untapped
from vtr.types import VtrError


def check_parts(plan: Plan, host: Host) -> None:
    """Refuses a model of which only a part is compiled, where the plan acts inside that part.

    Raises:
        VtrError: naming the part.
    """
    if _compiled(host.model) or _compiled(host.base):
        return
    stages = {item.step.stage for item in plan.steps}
    reads = {
        signal.tower or item.step.stage in ("tower", "input") for item in plan.steps for signal in item.step.needs if not untapped(signal)
    }
    inside = bool(stages & {"prefill", "decode"}) or host.sliding_window() is not None
    found = [host.language.module] if plan.steps and _compiled(host.language.module) else []
    found += _compiled_parts(host.language) if inside else []
    found += _compiled_parts(host.tower) if stages & {"input", "tower"} or True in reads else []
    if found:
        raise VtrError(
            f"vtr.apply: {type(getattr(found[0], '_orig_mod', found[0])).__name__} is compiled by itself (torch.compile), and hooks "
            "inside it do not know the call they are in; compile the whole model, or use a method that acts elsewhere"
        )


def _compiled_parts(stack: Stack) -> list[Any]:
    """Returns the modules of a stack that are compiled by themselves."""
    parts = [stack.module, *stack.blocks, *(part for block in stack.blocks for part in _attention(stack, block))]
    return [part for part in parts if _compiled(part)]


def _attention(stack: Stack, block: Any) -> list[Any]:
    try:
        return [stack.attention(block)]
    except AttributeError:  # refused by name, where it is needed
        return []


def _compiled(module: Any) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
