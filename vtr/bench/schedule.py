"""How many tokens each layer really runs on, measured; and counts that data-dependent methods are made to follow on random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._protocol import Host, host_of
from vtr.planning import plan
from vtr.plans import Change, Plan
from vtr.reduction import reduced
from vtr.types import Method, Selection, Step, View, VtrError
from vtr.types.method import with_settings


@dataclass(frozen=True)
class Schedule:
    """Lengths that a prefill runs on; two methods with one schedule have one floor.

    Args:
        grid: `(rows, cols)` of patches when images are made smaller in front of the tower, else None.
        tower: per tower layer that runs, patches of a view in front of its attention and of its MLP, prefix tokens included; of all images where
            the tower takes them as one sequence.
        projector: rows of them that are projected.
        llm: length of the sequence at every LLM layer, text included.
        frozen: LLM layers that compute text tokens only.
    """

    grid: tuple[int, int] | None
    tower: tuple[tuple[int, int], ...]
    projector: int
    llm: tuple[int, ...]
    frozen: tuple[int, ...] = ()


class Watch:
    """Hooks that note the lengths of one forward; installed behind those of a reduction, so that they see what it leaves."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.attention: dict[int, int] = {}
        self.mlp: dict[int, int] = {}
        self.llm: dict[int, int] = {}
        self.projector = 0
        self.pixels: tuple[int, int] = (0, 0)
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Watch:
        host = self.host
        if "input" in host.stages:  # images may be made smaller there
            self._undo.append(host.tower.embeddings.patch_embedding.register_forward_pre_hook(self._see_pixels).remove)
        self._undo.append(host.projector.register_forward_pre_hook(self._see_projector).remove)
        for table, modules in (
            (self.attention, host.tower.blocks),
            (self.mlp, [host.tower.before_mlp(block) for block in host.tower.blocks]),
            (self.llm, host.language.blocks),
        ):
            for i, module in enumerate(modules):
                self._undo.append(module.register_forward_pre_hook(self._see(table, i), with_kwargs=True).remove)
        return self

    def __exit__(self, *_error: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _see(self, table: dict[int, int], i: int) -> Callable[[Any, tuple, dict], None]:
        def hook(_module: Any, args: tuple, kwargs: dict) -> None:
            table[i] = (args[0] if args else kwargs["hidden_states"]).shape[-2]

        return hook

    def _see_pixels(self, _module: Any, args: tuple) -> None:
        self.pixels = (args[0].shape[-2], args[0].shape[-1])

    def _see_projector(self, _module: Any, args: tuple) -> None:
        self.projector = args[0].shape[-2]

    def schedule(self, lengths: Sequence[int] | None = None, frozen: Iterable[int] = ()) -> Schedule:
        """Returns the lengths that were seen.

        Args:
            lengths: of the LLM's layers when some of them are frozen, whose input is shorter than the sequence.
            frozen: those layers.
        """
        seen = tuple(side // self.host.tower.patch_size for side in self.pixels)
        return Schedule(
            grid=None if seen in ((0, 0), self.host.tower.patch_grid) else (seen[0], seen[1]),
            tower=tuple((self.attention[i], self.mlp[i]) for i in sorted(self.attention)),
            projector=self.projector,
            llm=tuple(lengths) if lengths is not None else tuple(self.llm[i] for i in sorted(self.llm)),
            frozen=tuple(sorted(frozen)),
        )


@torch.no_grad()
def measure_schedule(model: Any, inputs: Mapping[str, Tensor], method: Method | Plan | None) -> Schedule:
    """Returns the lengths of one prefill, with a method or a plan, or of the full model (None)."""
    host = host_of(model)
    if method is None:
        with Watch(host) as watch:
            model(**inputs, logits_to_keep=1)
        return watch.schedule()
    with reduced(model, method) as reduction, Watch(host) as watch:
        model(**inputs, logits_to_keep=1)
        return watch.schedule(reduction.report().sequence_lengths, reduction.plan.frozen)


def kept_schedule(full: Schedule, text: int, keep: int) -> Schedule:
    """Returns the kept floor: the whole tower, then an LLM that is given `keep` visual tokens from the start."""
    return replace(full, llm=(text + keep,) * len(full.llm))


def decides_itself(plan: Plan) -> list[Step]:
    """Returns the steps with which methods remove as many tokens as the images ask for, whatever their budget says."""
    return [item.step for item in plan.steps if _decides(item.step) and plan.methods[item.method].budget is not None]


@torch.no_grad()
def measure_shares(model: Any, prompts: Iterable[Mapping[str, Tensor]], method: Method) -> tuple[float, ...]:
    """Returns what the steps that decide for themselves leave, one after the other, as shares of the tokens in front of the first of them.

    Args:
        model: a trained checkpoint.
        prompts: inputs of it.
        method: with its budget; an int `keep` is of this checkpoint's images.

    Returns:
        One share per such step, the mean over images; empty when there is none.
    """
    made = plan(model, method)
    seen: list[list[float]] = [[] for _ in decides_itself(made)]

    def note(order: int, view: View, selection: Selection) -> Selection:
        if selection.keep is None:
            raise VtrError(f"bench: {method.name} answers with an index where it decides for itself; give --schedule own")
        left = (selection.keep & view.real).sum(1).tolist()
        start = view.memory.setdefault(_START, list(view.counts))
        seen[order] += [n / max(first, 1) for n, first in zip(left, start, strict=True)]
        return selection

    noted = made.map(_through(note))
    for inputs in prompts:
        with reduced(model, noted):
            model(**inputs, logits_to_keep=1)
    return tuple(sum(own) / max(len(own), 1) for own in seen)


def forced(made: Plan, shares: Sequence[float]) -> Plan:
    """Returns the plan of a method with its own counts replaced by given ones; it still computes everything it computes.

    Args:
        made: of a method with steps that decide for themselves.
        shares: from `measure_shares`, there for another number of steps perhaps; read at the same relative depth.
    """
    spread = _stretch(shares, len(decides_itself(made)))

    def follow(order: int, view: View, selection: Selection) -> Selection:
        if selection.keep is None:
            raise VtrError(f"bench: {made.methods[0].name} answers with an index where it decides for itself; give --schedule own")
        start = view.memory.setdefault(_START, list(view.counts))
        wanted = [min(max(round(spread[order] * first), 1), now) for first, now in zip(start, view.counts, strict=True)]
        rank = (~view.real).to(torch.uint8) * 2 + (~selection.keep).to(torch.uint8)  # its own choice first, then lowest index
        place = rank.argsort(dim=1, stable=True).argsort(dim=1)
        limit = torch.tensor(wanted).to(place.device, non_blocking=True)
        return replace(selection, keep=place < limit[:, None])

    return made.map(_through(follow))


_START = "bench_start"


def _stretch(values: Sequence[float], count: int) -> list[float]:
    """Returns `values` at `count` places of the same relative depth, linear in between."""
    if count == len(values):
        return list(values)
    found = []
    for i in range(count):
        at = min(max((i + 0.5) / count * len(values) - 0.5, 0.0), len(values) - 1.0)
        low = int(at)
        high = min(low + 1, len(values) - 1)
        found.append(values[low] + (at - low) * (values[high] - values[low]))
    return found


def _decides(step: Step) -> bool:
    return step.action in ("remove", "merge") and not step.counted and step.select is not None


def _through(change: Callable[[int, View, Selection], Selection]) -> Change:
    """Returns the change of a plan whose self-deciding steps hand their Selection through `change(number of the step, view, selection)`."""

    def changed(_method: Method, steps: Sequence[Step]) -> list[Step]:
        numbers = iter(range(len(steps)))
        return [replace(step, select=_behind(step.select, change, next(numbers))) if _decides(step) else step for step in steps]

    return changed


def _behind(select: Any, change: Callable[[int, View, Selection], Selection], number: int) -> Callable[[View], Selection]:
    return lambda view: change(number, view, select(view))


def scaled(method: Method, here: int, there: int) -> Method:
    """Returns the method with an int `keep` of images of `here` tokens turned into the same share of `there` tokens."""
    return method if method.keep is None or here == there else with_settings(method, keep=max(round(method.keep * there / here), 1))
