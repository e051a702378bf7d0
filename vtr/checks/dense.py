"""Refuses plans that a ViT without an LLM cannot do, and those that a step which gives all tokens back does not go with."""

from __future__ import annotations

from vtr.hosts._dense import DenseHost
from vtr.plans import Plan, signal_layer
from vtr.types import VtrError


def check_restoring(plan: Plan) -> None:
    """Refuses what acts on the tower's tokens, or reads them, where a method has merged them and will give all of them back.

    Raises:
        VtrError: naming the method in the way.
    """
    for number in plan.restoring:
        own = [s for s in plan.steps if s.method == number]
        first = min(s.step.layer for s in own if s.step.action == "merge")
        end = next(s.step.layer for s in own if s.step.action == "restore")
        for other in (s for s in plan.steps if s.method != number):
            step = other.step
            if step.stage == "tower" and first <= step.layer < end:
                raise VtrError(
                    f"{other.name}: acts at tower layer {step.layer}, where {own[0].name} has put tokens together that it restores at "
                    f"layer {end}; use one of the two, or layers outside {first} to {end - 1}"
                )
            for signal in step.needs:
                layer = signal_layer(signal, step)
                if (signal.tower or step.stage == "tower") and first <= layer < end:
                    raise VtrError(
                        f"{other.name}: reads {signal.kind} of tower layer {layer}, where {own[0].name} has put tokens together; use one of the two"
                    )
        earlier = (s for s in plan.steps if s.step.stage == "tower" and s.removes and s.step.layer < first)
        for other in (s for s in earlier if s.method not in plan.restoring):
            raise VtrError(
                f"{own[0].name}: needs the whole token grid at tower layer {first}, where {other.name} has removed tokens at layer "
                f"{other.step.layer} already; let it act at layer {end} or later"
            )


def check_dense(plan: Plan, host: DenseHost) -> None:
    """Refuses what a ViT without an LLM cannot do: it must get all tokens of its grid back, and merges only where its host says how.

    Raises:
        VtrError: naming the method and what it would need.
    """
    if len(plan.methods) > 1:
        raise VtrError(
            f"vtr.apply: host {host.name!r} takes one method at a time, got {', '.join(m.name for m in plan.methods)}; leave one"
        )
    for s in plan.steps:
        step = s.step
        if step.action not in ("merge", "restore"):
            raise VtrError(
                f"{s.name}: gives no token back that it removes, but {host.name!r} needs its full token grid at the end; use 'expedit', 'tome' "
                "or 'pool'"
            )
        if step.at == "mlp" and host.rotary:
            raise VtrError(
                f"{s.name}: the rotary positions of {host.name!r} need tokens that form a grid, which merged ones do not; use 'expedit', or "
                "'pool' with grid=(rows, cols)"
            )
        if step.at == "mlp" and host.merge_point is None:
            raise VtrError(
                f"{s.name}: the host {host.name!r} does not know how its blocks merge between attention and MLP; use 'expedit', or 'pool' with "
                "grid=(rows, cols)"
            )
        if step.at == "mlp" and step.proportional and host.merge_point is not None and host.merge_point.mask is None:
            raise VtrError(f"{s.name}: blocks of {host.name!r} take no mask for proportional attention; set proportional=False")
        for signal in step.needs:
            if signal.kind != "k" or step.at != "mlp" or signal_layer(signal, step) != step.layer or signal.tower:
                raise VtrError(
                    f"{s.name}: host {host.name!r} shows only the keys of the merging block, not {signal.kind}; use 'expedit' or 'pool'"
                )
