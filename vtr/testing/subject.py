"""The method that is checked: its settings for the tiny models, and runs that several checks look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtr.registry import list_methods, method_class
from vtr.testing.families import LAYERS, PAD, SIDE
from vtr.testing.given import apply, reduced
from vtr.testing.tiny_models import ALL_KINDS, FAMILIES, PIXELS_OF, VIDEO_KINDS, WITH_TEXT_ONLY, Batch, batch_of, generate, model_of
from vtr.types import BUDGETS, Geometry, Method, VtrError

TINY = Geometry(
    host="llava",
    tower_layers=4,
    feature_layer=2,
    prefix_tokens=1,
    has_cls=True,
    patch_grid=(SIDE, SIDE),
    llm_layers=LAYERS,
    most_tokens=SIDE * SIDE,
    kinds=("image", "video"),
)
"""What a method sees of a tiny model, for checks that need none."""


class Broken(AssertionError):
    """A promise that a method does not keep: `method: rule, got value; what to do`."""

    def __init__(self, subject: Subject, found: str, way_out: str = "") -> None:
        super().__init__(f"{subject.cls.name}: {found}" + (f"; {way_out}" if way_out else ""))


def require(kept: bool, subject: Subject, found: str, way_out: str = "") -> None:
    """Raises `Broken` with the method's name unless the promise is kept."""
    if not kept:
        raise Broken(subject, found, way_out)


class Subject:
    """A method class, with what it needs on the tiny models.

    Args:
        method: registered name, class, or an instance, whose settings apart from the budget are used.
        settings: settings without which the method refuses these models.
        random: settings with which another seed changes the result, where the default does not depend on the seed.
        least: fewest tokens per view that the method can leave with the tiny tower; None = found by trying.
    """

    def __init__(
        self,
        method: str | type[Method] | Method,
        settings: Mapping[str, Any] | None = None,
        random: Mapping[str, Any] | None = None,
        least: int | None = None,
    ) -> None:
        given = {name: value for name, value in vars(method).items() if name not in BUDGETS} if isinstance(method, Method) else {}
        self.cls: type[Method] = method_class(method) if isinstance(method, str) else type(method) if isinstance(method, Method) else method
        self.settings, self.random, self.least = {**given, **(settings or {})}, dict(random or {}), least
        self._known: dict[Any, Any] = {}

    @property
    def registered(self) -> bool:
        """Returns whether the class is the one registered under its name."""
        return self.cls.name in list_methods() and method_class(self.cls.name) is self.cls

    def method(self, keep: int | None = None, kind: str = "llava") -> Method:
        """Returns the method, with a budget where it takes one: `keep`, or the fewest that it can leave on that kind of model."""
        budget = {} if keep is None or not self.cls.takes_budget else {"keep": max(keep, self.fewest(kind))}
        return self.cls(**{**self.settings, **budget})

    def fewest(self, kind: str) -> int:
        """Returns the smallest keep that is not refused on a kind of model, 36 if all are."""
        if self.least is not None:
            return self.least * (5 if FAMILIES[kind].anyres else 1)
        if not self.works_on(kind):
            return 0
        key = ("fewest", kind)
        if key not in self._known:
            self._known[key] = next((keep for keep in range(1, SIDE * SIDE) if self._accepts(kind, keep)), SIDE * SIDE)
        return self._known[key]

    def _accepts(self, kind: str, keep: int) -> bool:
        try:
            apply(model_of(kind), self.cls(**{**self.settings, "keep": keep})).remove()
        except (ValueError, VtrError):
            return False
        return True

    @property
    def adaptive(self) -> bool:
        """Returns whether a step removes more behind the budget, where it sees fit."""
        return any(not step.counted for step in self.method().steps(TINY))

    def works_on(self, kind: str) -> bool:
        """Returns whether the card says that the method can run on a kind of model."""
        card, family = self.cls.card, FAMILIES[kind]
        missing = (card.needs_cls and not family.has_cls) or (card.needs_anyres and not family.anyres)
        return not missing and not (card.needs_video and kind not in VIDEO_KINDS)

    def home(self) -> str:
        """Returns the first kind of model that the method can run on."""
        return next(kind for kind in (*ALL_KINDS, *VIDEO_KINDS) if self.works_on(kind))

    @torch.no_grad()
    def run(self, batch: Batch, method: Method | None = None, **arguments: Any) -> tuple[Tensor, Any]:
        """Returns logits and report of one reduced forward, in the dtype of the batch; `keep=7` unless a method is given."""
        dtypes = [batch.inputs[name].dtype for name in PIXELS_OF.values() if name in batch.inputs]
        model = model_of(batch.kind, "sdpa", dtypes[0] if dtypes else torch.float32)
        with reduced(model, method or self.method(7, batch.kind)) as reduction:
            logits = model(**batch.inputs, **arguments).logits
            return logits, reduction.report()

    def reduced_once(self, kind: str, keep: int | None) -> tuple[Tensor, Any]:
        """Returns `run` of a batch in float32, computed once."""
        key = ("reduced", kind, keep)
        if key not in self._known:
            self._known[key] = self.run(batch_of(kind), self.method(keep, kind))
        return self._known[key]

    @torch.no_grad()
    def unreduced(self, kind: str, alone: bool) -> tuple[Batch, Tensor, Any]:
        """Returns a batch, or its second row alone, with the full model's logits and answer, computed once for all methods."""
        if (kind, alone) not in _UNREDUCED:
            model, batch = model_of(kind), batch_of(kind)
            batch = batch.row(1) if alone else batch
            _UNREDUCED[kind, alone] = (batch, model(**batch.inputs, position_ids=batch.positions).logits, generate(model, batch))
        return _UNREDUCED[kind, alone]

    @torch.no_grad()
    def by_itself(self, kind: str, row: int) -> tuple[Tensor, Any]:
        """Returns logits and report of one prompt by itself in float64, computed once; nothing is reported of one without an image."""
        key = ("alone", kind, row)
        if key not in self._known:
            batch = batch_of(kind, WITH_TEXT_ONLY, dtype=torch.float64).row(row)
            model = model_of(kind, "sdpa", torch.float64)
            if batch.shots[0]:
                self._known[key] = self.run(batch)
            else:
                with reduced(model, self.method(7, kind)):
                    self._known[key] = model(**batch.inputs).logits, None
        return self._known[key]


_UNREDUCED: dict[tuple[str, bool], tuple[Batch, Tensor, Any]] = {}


def retained_of(report: Any) -> list[list[int]]:
    """Returns the retained patch ids of every image."""
    return [image["retained"] for image in report.to_dict()["images"]]


def without_images(batch: Batch) -> Batch:
    """Returns the same prompts with their images cut out, left padded."""
    rows = [ids[~visual & real] for ids, visual, real in zip(batch.inputs["input_ids"], batch.visual, batch.valid, strict=True)]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((width - len(row),), PAD), row]) for row in rows])
    mask = torch.stack([torch.arange(width).ge(width - len(row)).long() for row in rows])
    return Batch(batch.kind, {"input_ids": ids, "attention_mask": mask}, ((),) * len(rows))
