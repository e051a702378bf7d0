"""A plan: the steps of one or several methods in model order, checked against the host, with their budgets resolved per image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vtr.files import write_atomic
from vtr.types import FrameOption, Geometry, Kind, Method, NewlineOption, PositionOption, Signal, Step
from vtr.types.errors import SettingError, WrongValue

Change = Callable[[Method, tuple[Step, ...]], Sequence[Step]]

FEWEST = 8
"""Tokens of an image that are left at the end, at least, where a mean over the layers decides how many; a smaller mean may be asked for."""

PLAN_FILE = "vtr.json"
"""The file of a plan in the folder of a checkpoint."""

_STAGES = {"input": 0.0, "tower": 1.0, "boundary": 2.0, "prefill": 3.0, "decode": 4.0}
_PLACES = {"input": "pixels", "tower": "tower layer", "boundary": "boundary", "prefill": "LLM layer", "decode": "new tokens at LLM layer"}


@dataclass(frozen=True)
class PlanStep:
    """A step with the method it came from; `last` = no removal of that method comes after it."""

    step: Step
    method: int
    name: str
    position_ids: PositionOption
    newlines: NewlineOption
    last: bool
    frames: FrameOption = "all"

    @property
    def removes(self) -> bool:
        """Whether fewer tokens may be left behind it."""
        return self.step.action in ("remove", "merge", "input")

    @property
    def in_tower(self) -> bool:
        """Whether it acts in front of the projector, so that it needs the images to be encoded inside the reduction."""
        return self.step.stage in ("input", "tower") or self.step.side == "before_projector"

    def by_view(self, kind: Kind) -> bool:
        """Whether the rows of its View are single views of visuals of a kind; a method for images sees a video as `frames` says."""
        return self.frames == "each" if kind == "video" and "image" in self.step.on else self.step.per == "view"

    def alone(self, kind: Kind) -> bool:
        """Whether it sees every frame of a video as an image of its own."""
        return kind == "video" and "image" in self.step.on and self.frames == "each"

    @property
    def place(self) -> str:
        """Where it acts, in words: `LLM layer 2`."""
        step = self.step
        if step.stage not in ("tower", "prefill", "decode"):
            return _PLACES[step.stage] + (" before the projector" if self.in_tower and step.stage == "boundary" else "")
        return f"{_PLACES[step.stage]} {step.layer}" + (" behind attention" if step.at == "mlp" else "")


@dataclass(frozen=True, repr=False)
class Plan:
    """What is done to a model, in model order: data, made by `vtr.plan` and checked against the model.

    `print(plan)` shows it. `vtr.reduced`, `vtr.apply` and `vtr.plan` take it in place of a method, and so do they what `to_dict` returns.

    Args:
        methods: with their settings.
        steps: of all of them, in model order.
        llm_layers: number of LLM layers, 0 without an LLM.
        geometry: facts of the model it was made for.
        changes: see `map`; made again when the plan is made again for another model.
    """

    methods: tuple[Method, ...]
    steps: tuple[PlanStep, ...]
    llm_layers: int
    geometry: Geometry | None = None
    changes: tuple[Change, ...] = field(default=(), compare=False)

    @property
    def host(self) -> str:
        """Name of the host of the model, e.g. `llava`."""
        return "" if self.geometry is None else self.geometry.host

    def to_dict(self) -> dict[str, Any]:
        """Returns host and methods with all their settings as plain JSON types; steps follow from them.

        `vtr.plan(model, plan.to_dict())` makes the plan again, also from JSON or YAML.

        Raises:
            ValueError: `map` changed its steps, which cannot be written down.
        """
        if self.changes:
            raise WrongValue("Plan.to_dict: steps that Plan.map changed cannot be written down; call it on the plan before the change")
        return {"host": self.host, "methods": [method.to_dict() for method in self.methods]}

    def save(self, target: str | Path) -> Path:
        """Writes the plan, whole or not at all, as `vtr.json` of a folder such as a checkpoint's, or as a file; `vtr.load_plan` reads it.

        Args:
            target: a folder that exists, or a `.json` file in one.

        Returns:
            The file.

        Raises:
            ValueError: no such folder, another kind of file, or steps that cannot be written down, see `to_dict`.
        """
        path = Path(target).expanduser()
        path = path / PLAN_FILE if path.is_dir() else path
        if path.suffix != ".json" or not path.parent.is_dir():
            raise WrongValue(f"Plan.save: must get a folder that exists or a .json file in one, got {str(target)!r}; make the folder first")
        write_atomic(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    def map(self, change: Change) -> Plan:
        """Returns a plan with other steps: those of every method go through `change`.

        Args:
            change: `(method, its steps in model order) -> its new steps`. It is called again, and what it returns is checked, when the plan is
                put on a model.
        """
        items: list[PlanStep] = []
        for number, method in enumerate(self.methods):
            own = [item for item in self.steps if item.method == number]
            steps = change(method, tuple(item.step for item in own))
            items += planned(steps, number, method)
        return replace(self, steps=in_model_order(items), changes=(*self.changes, change))

    # ---- what is left of an image
    def after(self, n: int) -> list[int]:
        """Returns the visual tokens that are left of an image of `n` behind each step.

        Steps that decide themselves how much stays count as removing nothing, so that numbers are upper bounds where the plan is `adaptive`.

        Raises:
            ValueError: `average_keep` is out of reach for such an image.
        """
        found, now = [], n
        for item in self.steps:
            if self.methods[item.method].removes_all and item.removes:
                now = 0
            elif item.removes:
                now = min(self.targets(item, [n], [now])[0], self._of_grid(item.step, n) or now)
            elif item.step.action == "restore":
                now = n
            found.append(now)
        return found

    def counts(self, n: int) -> list[int]:
        """Returns the visual tokens of an image of `n` at every layer of the LLM, see `after`; without an LLM at every block of the ViT."""
        layers = self.llm_layers or (self.geometry.tower_layers if self.geometry else 0)
        found = [n] * layers
        for item, left in zip(self.steps, self.after(n), strict=True):
            first = item.step.layer + (item.step.at == "mlp") if item.step.stage == "prefill" or not self.llm_layers else 0
            found[first:] = [left] * (layers - first)
        return found

    @property
    def adaptive(self) -> bool:
        """Whether a method decides itself how many tokens stay at the end."""
        return any(item.last and not self.counted(item) and not self.methods[item.method].removes_all for item in self.steps)

    @property
    def frozen(self) -> list[int]:
        """LLM layers that do not compute visual tokens, ascending."""
        return sorted({item.step.layer for item in self.steps if item.step.action == "freeze"})

    @property
    def uses_tower(self) -> bool:
        """Whether images have to be encoded inside the reduction: something happens in the tower, or is read there."""
        return any(item.in_tower for item in self.steps) or bool(self.signals(tower=True))

    def _of_grid(self, step: Step, n: int) -> int | None:
        """Tokens of an image of `n` that a step leaves of its grid; None where no grid decides that."""
        grid = None if step.grid is None or self.geometry is None else self.geometry.patch_grid
        if grid is None or step.grid is None or n % (grid[0] * grid[1]):
            return None
        rows, cols = step.grid(grid)
        return n // (grid[0] * grid[1]) * rows * cols

    # ---- in words
    def described(self) -> str:
        """Returns the methods with all their settings, e.g. `fastv(keep=64, layer=2)`."""
        return ", ".join(map(_described, self.methods))

    def summary(self) -> str:
        """Returns what is left of the largest image of the model in a few words: `576 visual tokens -> 64`."""
        most = self._most()
        if most is None:
            return "any number of visual tokens"
        try:
            left = [most, *self.after(most)][-1]
        except ValueError:
            return f"{most} visual tokens -> as many as each image needs"
        frozen = f", not computed in {len(self.frozen)} layers" if self.frozen else ""
        return f"{most} visual tokens -> {'at most ' if any(map(self._bounds, self.steps)) else ''}{left}{frozen}"

    def __repr__(self) -> str:
        return f"Plan({self.host or 'no host'}: {self.described()}; {self.summary()})"

    def __str__(self) -> str:
        most, left, mean = self._most(), ["?"] * len(self.steps), ""
        try:
            if most is not None:
                left = [str(count) for count in self.after(most)]
                mean = f"mean over {len(self.counts(most))} layers: {fmean(self.counts(most) or [most]):.1f}"
        except ValueError:
            mean = "average_keep is out of reach for the largest image; smaller ones are asked when they come"
        rows = [("step", "does", "method", f"left of {most or 'an image'}")]
        for item, count in zip(self.steps, left, strict=True):
            does = "resize" if item.step.action == "input" else item.step.action
            rows.append((item.place, does, item.name, ("at most " if self._bounds(item) else "") + count))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        changed = " (changed by map)" if self.changes else ""
        return "\n".join([f"Plan for {self.host or 'no host'}: {self.described()}{changed}", *lines, *([f"  {mean}"] if mean else [])])

    def _bounds(self, item: PlanStep) -> bool:
        """Whether how much stays behind a step is known only when it has run."""
        return item.removes and not self.counted(item) and not self.methods[item.method].removes_all and item.step.grid is None

    def _most(self) -> int | None:
        return None if self.geometry is None else self.geometry.most_tokens

    # ---- what the engine asks
    def __post_init__(self) -> None:
        places: dict[Any, list[PlanStep]] = {}
        for s in self.steps:
            for place in (s.step.stage, (s.step.stage, s.step.layer)):
                places.setdefault(place, []).append(s)
        object.__setattr__(self, "_places", places)

    def at(self, stage: str, layer: int | None = None, **fields: Any) -> list[PlanStep]:
        """Returns the steps of a stage (at a layer), in list order; `fields` are matched against the step."""
        found = self._places.get(stage if layer is None else (stage, layer), [])  # type: ignore[attr-defined]
        return [s for s in found if all(getattr(s.step, name) == value for name, value in fields.items())]

    def signals(self, tower: bool) -> dict[int, set[Signal]]:
        """Returns layer -> signals that some step reads there, for the tower or the LLM; those that need a tap."""
        found: dict[int, set[Signal]] = {}
        for s in self.steps:
            for signal in s.step.needs:
                if not untapped(signal) and (signal.tower or s.step.stage in ("tower", "input")) == tower:
                    found.setdefault(signal_layer(signal, s.step), set()).add(signal)
        return found

    def last_use(self, tower: bool) -> dict[int, int]:
        """Returns layer -> last layer of the tower, or of the LLM, whose steps read it; -1 where only later stages do."""
        last = dict.fromkeys(self.signals(tower), -1)
        for s in self.at("tower" if tower else "prefill"):
            for signal in s.step.needs:
                if not untapped(signal) and (tower or not signal.tower):
                    layer = signal_layer(signal, s.step)
                    last[layer] = max(last[layer], s.step.layer)
        return last

    def cutter(self, kind: Kind) -> str:
        """Returns the first method that shortens the tower of visuals of a kind, empty where none does."""
        inside = (item for item in self.steps if item.step.stage in ("input", "tower") and item.step.action != "restore")
        return next((item.name for item in inside if kind in item.step.on), "")

    @property
    def restoring(self) -> set[int]:
        """Methods that give back all tokens they merged."""
        return {s.method for s in self.steps if s.step.action == "restore"}

    def counted(self, item: PlanStep) -> bool:
        """Whether a step has a budget to meet; the others decide themselves how much stays."""
        return item.step.counted and self.methods[item.method].budget is not None

    def targets(self, item: PlanStep, original: list[int], now: list[int]) -> list[int]:
        """Returns the tokens that a step is to leave of each image.

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
        """Returns the tokens that a method with a budget leaves of an image of `n` at its last removal.

        `average_keep` is solved over the whole plan.
        """
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
    if step.multiple is not None:
        return min(n, round(step.multiple * final))
    return final + round(step.share * (n - final))


def planned(steps: Sequence[Step], number: int, method: Method) -> list[PlanStep]:
    """Returns the steps of one method, whose settings are resolved, as those of a plan; `number` is its number there."""
    removals = [s for s in steps if s.action in ("remove", "merge", "input")]
    positions, frames = method.position_ids or "keep", method.frames or "all"
    return [PlanStep(s, number, method.name, positions, method.newlines, bool(removals) and s is removals[-1], frames) for s in steps]


def in_model_order(items: Iterable[PlanStep]) -> tuple[PlanStep, ...]:
    """Returns steps in the order in which a model comes to them; those at one place stay in list order."""

    def place(item: PlanStep) -> tuple[float, int, bool]:
        step = item.step
        stage = 1.5 if step.stage == "boundary" and step.side == "before_projector" else _STAGES[step.stage]
        return stage, step.layer if step.stage != "boundary" else 0, step.at == "mlp"

    return tuple(sorted(items, key=place))


def _described(method: Method) -> str:
    settings = ((f.name, getattr(method, f.name)) for f in fields(method))
    return f"{method.name}({', '.join(f'{name}={value!r}' for name, value in settings if value is not None)})"


def untapped(signal: Signal) -> bool:
    """Whether a signal is computed where a step reads it, without a tap."""
    return signal.kind.startswith("next_") or signal.kind in ("text_embedding", "frame_score")


def signal_layer(signal: Signal, step: Step) -> int:
    """Returns the layer that a signal of a step is read at; by default the one before the step's."""
    return signal.layer if signal.layer is not None else step.layer - 1
