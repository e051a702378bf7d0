"""What every step of a plan did to the tokens of one image or video, and plans that put some of these tokens back.

Both are changes of a plan (`Plan.map`): its steps run in the ordinary engine, with another function around what the method chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vtr.engine.selections import chosen_mask
from vtr.methods._score import ScoreMethod
from vtr.plans import PlanStep, in_model_order, planned
from vtr.types import Kind, Method, Selection, Step, View, VtrError
from vtr.types.errors import WrongValue


@dataclass(frozen=True)
class Taken:
    """One step of a plan, as it went.

    Args:
        place: where it acts, in words; action: what it does.
        seen: patch ids that it could choose among, ascending; empty where it does not look at tokens.
        kept: those that it left.
        pivots: patch id -> patch id that it was merged into, of tokens that it merged.
        ranks: patch id -> rank among those that it was compared with, from 1, where the method ranks; else empty.
        counts, keeps: per row of its View the tokens it saw and was to leave.
        fixed: why a token that it removed cannot be put back; empty where it can.
    """

    place: str
    action: str
    seen: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    pivots: dict[int, int] | None = None
    ranks: dict[int, int] | None = None
    counts: tuple[int, ...] = ()
    keeps: tuple[int, ...] = ()
    fixed: str = ""

    @property
    def gone(self) -> set[int]:
        """Returns the patch ids that it removed or merged."""
        return set(self.seen) - set(self.kept)


class Watching:
    """A change of a plan of one method that notes what its steps do and changes nothing; `taken` is in model order."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.taken: list[Taken] = []

    def __call__(self, method: Method, steps: Sequence[Step]) -> list[Step]:
        items = _in_order(method, steps)
        self.taken = [Taken(item.place, item.step.action, fixed=_fixed(item)) for item in items]
        return [
            item.step
            if item.step.select is None or not _sees_tokens(item)
            else replace(item.step, select=self._watched(number, item, method))
            for number, item in enumerate(items)
        ]

    def _watched(self, number: int, item: PlanStep, method: Method) -> Callable[[View], Any]:
        choose = item.step.select
        assert choose is not None

        def select(view: View) -> Any:
            answer = choose(view)
            chosen = answer if item.removes else Selection(keep=view.real)
            self.taken[number] = _noted(self.taken[number], view, chosen, patches(item, view, self.kind), _scores(item, method, view))
            return answer

        return select


class PuttingBack:
    """A change of a plan of one method: its steps leave what they left before, and some tokens more.

    What the method chose is not chosen anew. It merges as before, too; a token that is put back has its own value and stays for itself, and
    a pivot whose other tokens are all back has its own value again.

    Args:
        kind: of the visual; taken: what the steps did without it; tokens: patch ids that stay.
    """

    def __init__(self, kind: Kind, taken: Sequence[Taken], tokens: Collection[int]) -> None:
        self.kind, self.taken, self.tokens = kind, taken, set(tokens)

    def __call__(self, method: Method, steps: Sequence[Step]) -> list[Step]:
        found = []
        for taken, item in zip(self.taken, _in_order(method, steps), strict=True):
            acts = item.step.select is not None and _sees_tokens(item) and item.step.stage != "tower"
            select = self._selecting(taken, item) if acts and not taken.fixed else item.step.select
            # the budget is that of before, and some tokens more
            uncounted: dict[str, Any] = {"counted": False} if acts and item.removes else {}
            found.append(replace(item.step, select=select, **uncounted) if acts else item.step)
        return found

    def _selecting(self, taken: Taken, item: PlanStep) -> Callable[[View], Any]:
        choose = item.step.select
        assert choose is not None

        def select(view: View) -> Any:
            ids = patches(item, view, self.kind)
            back = _isin(ids, self.tokens) & view.real
            if not taken.seen:  # it had nothing to do
                return Selection(keep=view.real.clone()) if item.removes else choose(view)
            before = replace(view, real=view.real & _isin(ids, taken.seen), counts=list(taken.counts), keeps=list(taken.keeps))
            before.keep, before.most = torch.tensor(taken.keeps, device=view.keep.device), max(taken.keeps)
            answer = choose(before)
            if not item.removes:
                return answer
            kept = _isin(ids, taken.kept) & before.real
            return _with(answer, before, view, kept, back | (view.real & ~before.real), item.name)

        return select


def patches(item: PlanStep, view: View, kind: Kind) -> Tensor:
    """Returns the patch ids `(G, N)` of a View in the numbers of a report, for a prompt with one image or video."""
    if not item.alone(kind):
        return view.patch
    areas = [rows * cols for grids in view.grids for rows, cols in grids]
    return view.patch + torch.tensor([0, *accumulate(areas[:-1])], device=view.patch.device)[:, None]


def _in_order(method: Method, steps: Sequence[Step]) -> tuple[PlanStep, ...]:
    return in_model_order(planned(steps, 0, method))


def _sees_tokens(item: PlanStep) -> bool:
    return item.step.action in ("remove", "merge", "observe")


def _fixed(item: PlanStep) -> str:
    """Returns why a token that a step removed cannot be put back, as far as the step itself says it."""
    if item.step.stage == "input":
        return "the picture was made smaller in front of the vision tower, so that no single token is missing"
    if item.step.stage == "tower" and item.removes:
        return "it left inside the vision tower, whose later layers would be other ones with it; only what leaves behind the tower can be put back"
    return ""


def _isin(ids: Tensor, some: Collection[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(some), dtype=torch.int64, device=ids.device))


def _scores(item: PlanStep, method: Method, view: View) -> Tensor | None:
    """Returns the scores `(G, N)` of a method that ranks and does nothing else, once more."""
    if not isinstance(method, ScoreMethod) or type(method).steps is not ScoreMethod.steps:
        return None
    return method.score(view, *(view.signals[need] for need in item.step.needs)).masked_fill(~view.real, -torch.inf)


def _noted(blank: Taken, view: View, answer: Selection, ids: Tensor, scores: Tensor | None) -> Taken:
    real, chosen = view.real, chosen_mask(answer, view) & view.real
    pivots = {}
    if answer.assign is not None:
        into = torch.where(answer.assign >= 0, ids.gather(1, answer.assign.clamp_min(0)), -1)
        moved = real & ~chosen & (into >= 0)
        pivots = dict(zip(ids[moved].tolist(), into[moved].tolist(), strict=True))
    ranks = {}
    if scores is not None:
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
        ranks = dict(zip(ids[real].tolist(), rank[real].tolist(), strict=True))
    fixed = blank.fixed
    if not fixed and answer.grid is not None:
        fixed = "what is left is a smaller grid of means, in which a single token has no place"
    elif not fixed and answer.order == "given":
        fixed = "the method gives the tokens an order of its own, in which this one has no place"
    return replace(
        blank,
        seen=tuple(sorted(ids[real].tolist())),
        kept=tuple(sorted(ids[chosen].tolist())),
        pivots=pivots,
        ranks=ranks,
        counts=tuple(view.counts),
        keeps=tuple(view.keeps),
        fixed=fixed,
    )


def _with(answer: Selection, before: View, view: View, kept: Tensor, back: Tensor, name: str) -> Selection:
    """Returns what a step answered without the tokens that are put back, with them.

    Args:
        answer: of the method; before: the View that it saw, without tokens that earlier steps had removed; view: with them.
        kept: `(G, N)` bool, what the step kept without them; back: tokens that stay now.
        name: of the method.

    Raises:
        VtrError: the method merges other tokens than before.
    """
    keep = kept | back
    if (answer.tokens is None and answer.assign is None) or torch.equal(keep, view.real):  # nothing is merged
        return Selection(keep=keep)
    if not torch.equal(chosen_mask(answer, before) & before.real, kept):
        raise VtrError(
            f"{name}: merges other tokens when one is put back, so that it cannot be seen what this one alone does; try another token"
        )
    own, n = torch.arange(keep.shape[1], device=keep.device).expand_as(keep), keep.shape[1]
    tokens = view.tokens
    if answer.tokens is not None:
        values = answer.tokens.to(tokens.dtype)
        if answer.index is not None:
            spot = answer.index if answer.real is None else torch.where(answer.real, answer.index, n)
            room = torch.cat([tokens, tokens[:, :1]], 1)
            values = room.scatter(1, spot[..., None].expand_as(values), values)[:, :-1]
        alone = back if answer.assign is None else back | _left_alone(answer.assign, before.real & ~kept, back)
        tokens = torch.where((kept & ~alone)[..., None], values, tokens)
    assign = None if answer.assign is None else torch.where(back, own, torch.where(before.real, answer.assign, -1))
    return Selection(keep=keep, tokens=tokens, assign=assign)


def _left_alone(assign: Tensor, gone: Tensor, back: Tensor) -> Tensor:
    """Returns the pivots `(G, N)` bool all of whose tokens among those that were `gone` are `back`."""

    def named(some: Tensor) -> Tensor:
        spot = torch.where(some & (assign >= 0), assign, some.shape[1])
        return some.new_zeros(len(some), some.shape[1] + 1).scatter(1, spot, True)[:, :-1]

    return named(gone) & ~named(gone & ~back)


def check_put_back(taken: Sequence[Taken], tokens: Collection[int]) -> None:
    """Refuses tokens that cannot be put back.

    Raises:
        ValueError: a token that is no visual token, or was not removed.
        VtrError: the step that removed it does not allow it, saying why.
    """
    for token in sorted(tokens):
        if not any(step.action == "input" or token in step.gone for step in taken):
            raise WrongValue(f"give back: token {token} was not removed by any step; choose one that is gone")
        step = hindrance(taken, token)
        if step is not None:
            raise VtrError(f"give back: token {token} cannot be put back at {step.place}: {step.fixed}")


def hindrance(taken: Sequence[Taken], token: int) -> Taken | None:
    """Returns the step, the one that removed a token or a later one, that keeps it from being put back; None where it can be."""
    first = next((number for number, step in enumerate(taken) if step.action == "input" or token in step.gone), len(taken))
    return next((step for step in taken[first:] if step.fixed), None)


def left_after(tokens: Sequence[int], taken: Sequence[Taken]) -> tuple[list[int], dict[int, int]]:
    """Returns the patch ids that some steps left of all `tokens`, ascending, and for every token that was merged its pivot among them.

    A token that was pruned, or whose pivot was, has no pivot.
    """
    into = {token: token for token in tokens}
    for step in taken:
        if step.action == "restore":
            into = {token: token for token in tokens}
        elif step.seen:
            gone, pivots = step.gone, step.pivots or {}
            into = {token: pivots.get(pivot, -1) if pivot in gone else pivot for token, pivot in into.items()}
    kept = sorted(token for token, pivot in into.items() if token == pivot)
    return kept, {token: pivot for token, pivot in into.items() if pivot not in (token, -1)}
