"""What methods that remove in three layers of the LLM share: settings, their checks and the budget. Not a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vtr.ops.schedule import checked_counts, checked_layers, shares_of, table_schedule
from vtr.types import Budget, Geometry, Method


@dataclass(frozen=True, kw_only=True)
class Scheduled(Method):
    """Three removals: in which `layers`, and instead of a budget how many tokens each of them leaves."""

    layers: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", checked_layers(self.name, self.layers, 3))  # YAML and JSON hand in lists
        object.__setattr__(self, "counts", checked_counts(self.name, self.counts, 3))
        if self.counts is not None and (self.keep, self.keep_ratio, self.average_keep) != (None, None, None):
            raise ValueError(f"{self.name}: counts={list(self.counts)} is a budget already; leave keep, keep_ratio and average_keep out")

    @property
    def budget(self) -> Budget | None:
        return Budget(keep=self.counts[-1]) if self.counts is not None else super().budget

    def most_tokens(self, geometry: Geometry) -> int:
        """Returns the most tokens that an image of this model can have.

        Raises:
            ValueError: nobody knows.
        """
        if geometry.most_tokens is None:
            given = "counts" if self.counts is not None else "average_keep"
            raise ValueError(
                f"{self.name}: {given} is measured against the most visual tokens of an image, which host {geometry.host!r} does not limit; "
                "give keep_ratio"
            )
        return geometry.most_tokens

    def shares(self, geometry: Geometry, ratios: tuple[float, ...]) -> tuple[float, ...]:
        """Returns the share of the way from keep to N that each removal leaves: by `counts`, or by the published `ratios`."""
        return shares_of(ratios, 1) if self.counts is None else shares_of(self.counts, self.most_tokens(geometry))


@dataclass(frozen=True, kw_only=True)
class Tabled(Scheduled):
    """Three removals after one of several published tables, each with the counts it leaves of `of` tokens; `published` are its layers."""

    table: int | None = None

    tables: ClassVar[Mapping[int, tuple[int, ...]]]
    published: ClassVar[tuple[int, ...]]
    of: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table not in (None, *self.tables):
            raise ValueError(f"{self.name}: table must be one of {', '.join(map(str, self.tables))}, got {self.table!r}")

    @property
    def budget(self) -> Budget | None:
        given = super().budget
        return given if given is not self.default_budget else Budget(keep_ratio=self.tables[self.table or max(self.tables)][-1] / self.of)

    def schedule(self, geometry: Geometry) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Layers, and the share of the way from keep to N that each removal leaves.

        Where a model does not limit an image, the table is the one nearest to the budget of an image of `of` tokens, as in the paper.
        """
        budget = self.budget
        assert budget is not None
        most = (
            1 if budget.keep_ratio is not None else geometry.most_tokens or (self.of if self.counts is None else self.most_tokens(geometry))
        )
        return table_schedule(
            self.name,
            self.tables,
            self.published,
            layers=self.layers,
            counts=self.counts,
            table=self.table,
            depth=geometry.llm_layers,
            most=most,
            keep=budget.keep_ratio if budget.keep is None else budget.keep / most,
            average=None if budget.average_keep is None else budget.average_keep / most,
        )
