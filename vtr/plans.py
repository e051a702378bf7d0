"""A plan: the steps of one or several methods in model order, checked against the host, with their budgets resolved per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtr.types import Method, NewlineOption, PositionOption, Signal, Step
from vtr.types.errors import SettingError

FEWEST = 8
"""Tokens of an image that are left at the end, at least, where a mean over the layers decides how many; a smaller mean may be asked for."""


@dataclass(frozen=True)
class PlanStep:
    """A step with the method it came from; `last` = no removal of that method comes after it."""

    step: Step
    method: int
    name: str
    position_ids: PositionOption
    newlines: NewlineOption
    last: bool

    @property
    def removes(self) -> bool:
        return self.step.action in ("remove", "merge", "input")

    @property
    def in_tower(self) -> bool:
        """Whether it acts in front of the projector, so that it needs the images to be encoded inside the reduction."""
        return self.step.stage in ("input", "tower") or self.step.side == "before_projector"


@dataclass(frozen=True)
class Plan:
    """What is done to a model, in model order."""

    methods: tuple[Method, ...]
    steps: tuple[PlanStep, ...]
    llm_layers: int

    def at(self, stage: str, layer: int | None = None, **fields: Any) -> list[PlanStep]:
        """Steps of a stage (at a layer), in list order; `fields` are matched against the step."""
        return [
            s
            for s in self.steps
            if s.step.stage == stage
            and (layer is None or s.step.layer == layer)
            and all(getattr(s.step, name) == value for name, value in fields.items())
        ]

    def signals(self, tower: bool) -> dict[int, set[Signal]]:
        """Layer -> signals that some step reads there, for the tower or the LLM; those that need a tap."""
        found: dict[int, set[Signal]] = {}
        for s in self.steps:
            for signal in s.step.needs:
                if not untapped(signal) and (signal.tower or s.step.stage in ("tower", "input")) == tower:
                    found.setdefault(signal_layer(signal, s.step), set()).add(signal)
        return found

    @property
    def restoring(self) -> set[int]:
        """Methods that give back all tokens they merged."""
        return {s.method for s in self.steps if s.step.action == "restore"}

    def counted(self, item: PlanStep) -> bool:
        """Whether a step has a budget to meet; the others decide themselves how much stays."""
        return item.step.counted and self.methods[item.method].budget is not None

    def targets(self, item: PlanStep, original: list[int], now: list[int]) -> list[int]:
        """Tokens that a step is to leave of each image.

        Args:
            item: the step.
            original: visual tokens of each image before any removal.
            now: visual tokens of each image in front of this step.

        Returns:
            Per image, at most `now`; `now` itself for steps that decide for themselves how much stays.

        Raises:
            ValueError: `average_keep` out of reach for an image.
        """
        if not self.counted(item):
            return list(now)
        final = {n: self.final_keep(item.method, n) for n in set(original)}
        return [min(_left_by(item.step, final[n], n), have) for n, have in zip(original, now, strict=True)]

    def final_keep(self, method: int, n: int) -> int:
        """Tokens that a method with a budget leaves of an image of `n` by its last removal; `average_keep` is solved over the whole plan."""
        budget = self.methods[method].budget
        assert budget is not None
        if budget.average_keep is None:
            return budget.resolve(n)
        least, most = self._average(method, 1, n), self._average(method, n, n)
        if budget.average_keep < least - 1 or budget.average_keep > most:
            raise SettingError(self._out_of_reach(method, n, least, most), setting="average_keep")
        low, high = 1, n
        while low < high:  # the average grows with keep
            middle = (low + high) // 2
            low, high = (low, middle) if self._average(method, middle, n) >= budget.average_keep else (middle + 1, high)
        wanted = budget.average_keep
        keep = min((k for k in (low - 1, low) if k >= 1), key=lambda k: abs(self._average(method, k, n) - wanted))
        if keep < min(FEWEST, n) and wanted >= FEWEST and len(self.methods) > 1:
            name, mean = self.methods[method].name, self._average(method, min(FEWEST, n), n)
            raise SettingError(
                f"{name}: average_keep={wanted:g} is out of reach for an image of {n} visual tokens: this plan would leave {keep} at the end, and "
                f"goes down to {FEWEST}, an average of {mean:.1f}; ask for more, let the other methods keep fewer, or give keep",
                setting="average_keep",
            )
        return keep

    def _average(self, method: int, keep: int, n: int) -> float:
        """Mean over the LLM's layers of the tokens left of an image of `n`, where `method` leaves `keep`; steps without a budget count as
        removing nothing."""
        total, count, layer = 0, n, 0
        for item in self.steps:
            if not item.removes or not self.counted(item):
                continue
            start = item.step.layer if item.step.stage == "prefill" else 0
            total += count * (start - layer)
            layer, count = start, min(count, _left_by(item.step, keep if item.method == method else self.final_keep(item.method, n), n))
        return (total + count * (self.llm_layers - layer)) / self.llm_layers

    def _out_of_reach(self, method: int, n: int, least: float, most: float) -> str:
        name, wanted = self.methods[method].name, float(self.methods[method].average_keep or 0)
        first = next((s.step.layer for s in self.steps if s.method == method and s.removes and s.step.stage == "prefill"), 0)
        entering = min(
            (self.final_keep(s.method, n) for s in self.steps if s.method != method and s.step.stage != "prefill" and self.counted(s)),
            default=n,
        )
        reach = int((wanted - 1) * self.llm_layers / max(entering - 1, 1))
        return (
            f"{name}: average_keep={wanted:g} is out of reach for an image of {n} visual tokens: removal at layer {first} leaves an average of "
            f"at least {least:.1f} and at most {most:g}; ask for {'more' if wanted < least else 'less'}"
            + (f", or remove at layer {reach} or before" if 0 < reach < first else ", or remove at the boundary" if wanted < least else "")
        )


def _left_by(step: Step, final: int, n: int) -> int:
    """Tokens of an image of `n` behind a step of a method that leaves `final` in the end."""
    return final + round(step.share * (n - final))


def untapped(signal: Signal) -> bool:
    """Signals that are computed where they are asked for."""
    return signal.kind.startswith("next_") or signal.kind == "text_embedding"


def signal_layer(signal: Signal, step: Step) -> int:
    """The layer a signal of a step is read at; by default the one before the step's."""
    return signal.layer if signal.layer is not None else step.layer - 1
