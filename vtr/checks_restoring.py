"""What a plan must respect where a method merges tokens and gives all of them back, and on ViTs without an LLM."""

from __future__ import annotations

from vtr.hosts._dense import DenseHost
from vtr.plans import Plan, signal_layer
from vtr.types import VtrError


def check_restoring(plan: Plan) -> None:
    """Nothing else may act on the tower's tokens, or read them, between a method's merge and its restoring step.

    Raises:
        VtrError: naming the method in the way.
    """
    for number in plan.restoring:
        own = [s for s in plan.steps if s.method == number]
        first = min(s.step.layer for s in own if s.step.action == "merge")
        end = next(s.step.layer for s in own if s.step.action == "restore")
        for other in (s for s in plan.steps if s.method != number):
            if other.step.stage == "tower" and first <= other.step.layer < end:
                raise VtrError(
                    f"{other.name}: acts at tower layer {other.step.layer}, where {own[0].name} has put tokens together that it restores at "
                    f"layer {end}; use one of the two, or layers outside {first} to {end - 1}"
                )
            for signal in other.step.needs:
                if (signal.tower or other.step.stage == "tower") and first <= signal_layer(signal, other.step) < end:
                    raise VtrError(
                        f"{other.name}: reads {signal.kind} of tower layer {signal_layer(signal, other.step)}, where {own[0].name} has put "
                        f"tokens together; use one of the two"
                    )


def check_dense(plan: Plan, host: DenseHost) -> None:
    """A ViT without an LLM must get all tokens of its grid back, and merges only where its host says how.

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
