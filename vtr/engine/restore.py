"""Gives back all tokens of a grid after a method has merged them; the rest of the model sees the full grid."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.engine.shrinking import Shrinking
from vtr.ops.gather import take
from vtr.plans import PlanStep
from vtr.types import View, VtrError


def spread(run: Shrinking, tokens: Tensor) -> Tensor:
    """Returns full rows `(R, S0, D)` of short ones `(R, S, D)`: every token gets its pivot's value, NaN one that was pruned without trace."""
    places, total = run.tokens, len(run.tokens.images.alive)
    assign, gid = places.images.assign, places.gid()
    assert assign is not None
    position = torch.arange(gid.shape[1], device=gid.device).expand_as(gid)
    place = torch.full((total + 1,), tokens.shape[1], device=gid.device).scatter_(
        0, torch.where(gid >= 0, gid, total).flatten(), position.flatten()
    )
    known = torch.nn.functional.pad(tokens, (0, 0, 0, 1), value=torch.nan)  # the last token is for those without a pivot
    pivot = assign[places.gid_of]
    return take(known, torch.where(pivot >= 0, place[pivot.clamp_min(0)], tokens.shape[1]))


def restored(run: Shrinking, item: PlanStep, view: View, count: int) -> Tensor:
    """Returns full rows `(R, count, D)` that the restoring step `item` makes of what is left in the rows of its View.

    Raises:
        VtrError: the method returned another number of tokens.
    """
    assert item.step.select is not None
    started = run.clock.start(view.tokens.device)
    full = item.step.select(view)
    run.clock.stop(started, view.tokens.device)
    rows = len(view.tokens)
    if not isinstance(full, Tensor) or full.shape[:2] != (rows, count):
        got = tuple(full.shape) if isinstance(full, Tensor) else type(full).__name__
        raise VtrError(f"{item.name}: a restoring step must return ({rows}, {count}, D), got {got}; return all tokens of the grid")
    return full.to(view.tokens.dtype)
