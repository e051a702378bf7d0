"""What is left of the tokens of one stack while it runs, and the steps that make them fewer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtr.engine.clock import Clock
from vtr.engine.selections import check_selection, chosen_mask, limited
from vtr.engine.signals import Tap
from vtr.engine.tokens import Spots, Tokens
from vtr.engine.views import remember
from vtr.plans import Plan, PlanStep
from vtr.types import Selection, View


class Shrinking:
    """Tokens that become fewer while an LLM, a tower or a dense ViT runs; each of the three says what stands around a step.

    Attributes:
        plan: what is done.
        tokens: what is left; set when the stack begins.
        taps: layer -> what was seen there.
        pending: layer -> values in front of and behind a merge between its attention and its MLP.
        sized: merged tokens weigh by their size in the attention.
        clock: time spent choosing; checks: `(step, tokens kept per View row, tokens asked for)`, compared when a report is read.
    """

    tokens: Tokens

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.taps: dict[int, Tap] = {}
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.sized = False
        self.clock = Clock()
        self.checks: list[tuple[Any, Tensor, list[int]]] = []

    # ---- what each of the three says
    def counts_now(self, item: PlanStep) -> tuple[list[int], list[int]]:
        """Returns, per image, the visual tokens before any removal and those in front of a step."""
        raise NotImplementedError

    def passes(self, item: PlanStep) -> list[list[int] | None]:
        """Returns the images that a step sees together, once for every kind that it acts on; None = all."""
        return [None]

    def look(self, item: PlanStep, hidden: Tensor, target: list[int], among: list[int] | None) -> tuple[View, Spots]:
        """Returns the View of a step, with its signals, and where its tokens are.

        Args:
            item: the step.
            hidden: `(R, S, D)`, values of the tokens.
            target: tokens to leave of each image.
            among: images that it sees, None = all.
        """
        raise NotImplementedError

    def leave(self, item: PlanStep, view: View, spots: Spots, selection: Selection, keep: Tensor) -> tuple[Tensor, int | None] | None:
        """Returns what else stays or goes around the visual tokens, as `tokens.Leave` says; its last four arguments are of the step."""
        raise NotImplementedError

    def removed(self, item: PlanStep, selection: Selection, index: Tensor, valid: Tensor) -> None:
        """Follows a removal.

        Args:
            item: the step.
            selection: its answer.
            index: `(R, S')` int64 of the tokens left into the old positions.
            valid: `(R, S)` bool, real tokens before.
        """

    # ---- what is the same for all
    def run_step(self, item: PlanStep, hidden: Tensor) -> Tensor:
        """Runs one step on `hidden (R, S, D)`; returns it shorter, or itself when nothing is removed.

        Raises:
            TypeError, ValueError: the method's answer does not fit its View.
        """
        for among in self.passes(item):
            hidden = self._run(item, hidden, among)
        return hidden

    def _run(self, item: PlanStep, hidden: Tensor, among: list[int] | None) -> Tensor:
        original, now = self.counts_now(item)
        counted, target = self.plan.counted(item), self.plan.targets(item, original, now)
        seen = range(len(now)) if among is None else among
        if not any(now[i] for i in seen) or (item.removes and counted and all(target[i] == now[i] for i in seen)):
            return hidden
        started = self.clock.start(hidden.device)
        view, spots = self.look(item, hidden, target, among)
        assert item.step.select is not None
        selection = item.step.select(view)
        self.clock.stop(started, hidden.device)
        remember(view, spots, self.tokens.images, item.method)
        if item.step.action == "observe":
            return hidden
        check_selection(item.name, selection, view)
        chosen = chosen_mask(selection, view)
        if counted and selection.grid is None:
            chosen = limited(chosen & view.real, view.keep, item, view.keeps, self.checks)
        valid = self.tokens.valid
        hidden, index = self.tokens.select(
            hidden, view, spots, self.answered(selection), chosen, partial(self.leave, item, view, spots, selection)
        )
        if index is not None:
            self.removed(item, selection, index, valid)
            self.sized = self.sized or (item.step.action == "merge" and item.step.proportional)
        return hidden

    def answered(self, selection: Selection) -> Selection:
        """Returns an answer as this stack takes it."""
        return selection

    @property
    def masked(self) -> bool:
        """Whether attention needs `bias`."""
        return self.sized or not self.tokens.full

    def bias(self, prefix: int, dtype: torch.dtype) -> Tensor:
        """Returns the additive bias `(R, prefix + S)` on keys: log of the sizes of merged tokens, and the least number for filler."""
        gid = self.tokens.gid()
        bias = torch.zeros(gid.shape, dtype=dtype, device=gid.device)
        if self.sized:
            sizes = self.tokens.images.sizes[gid.clamp_min(0)].clamp_min(1)
            bias = bias + sizes.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)
        bias = bias.masked_fill(gid < 0, torch.finfo(dtype).min)
        return torch.nn.functional.pad(bias, (prefix, 0))
