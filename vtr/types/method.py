"""The base of every method, and the facts about a method that are not settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from vtr.types.budget import Budget
from vtr.types.geometry import Geometry
from vtr.types.settings import check_types
from vtr.types.step import NewlineOption, PositionOption, Stage, Step

BUDGETS = tuple(f.name for f in fields(Budget))
"""Settings that are a budget, in the order in which they are listed."""


@dataclass(frozen=True)
class Card:
    """Facts about a method that are not settings; `vtr list`, `vtr info` and the README are made from it."""

    title: str
    paper: str
    venue: str = ""
    arxiv: str = ""
    code: str = ""
    signals: str = "visual tokens"
    cost: str = ""
    needs_cls: bool = False
    needs_text: bool = False
    needs_anyres: bool = False
    exact: bool = True
    ours: bool = False
    experimental: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method: the budget and the options that all share. Settings are flat; `asdict` round-trips.

    Args:
        keep, keep_ratio, average_keep: the budget, at most one given; none given means `default_budget`.
        position_ids: `keep` = survivors keep their original positions; `renumber` = 0, 1, 2, ... after every removal.
        newlines: newline tokens kept for `rows` that still have a visual token, `all` or `none`.
    """

    keep: int | None = None
    keep_ratio: float | None = None
    average_keep: float | None = None
    position_ids: PositionOption = "keep"
    newlines: NewlineOption = "rows"

    name: ClassVar[str] = ""
    card: ClassVar[Card] = Card(title="", paper="")
    stages: ClassVar[tuple[Stage, ...]] = ()
    default_budget: ClassVar[Budget | None] = None
    """None: the method has no budget at all."""
    removes_all: ClassVar[bool] = False
    """Whether no visual token is left, which a method without a budget cannot say otherwise."""

    def __post_init__(self) -> None:
        check_types(self, self.name or type(self).__name__, skip=(*BUDGETS, "position_ids", "newlines"))
        if self.position_ids not in ("keep", "renumber"):
            raise ValueError(f"{self.name}: position_ids must be 'keep' or 'renumber', got {self.position_ids!r}")
        if self.newlines not in ("rows", "all", "none"):
            raise ValueError(f"{self.name}: newlines must be 'rows', 'all' or 'none', got {self.newlines!r}")
        given = {k: getattr(self, k) for k in BUDGETS if getattr(self, k) is not None}
        if self.default_budget is None and given:
            raise ValueError(f"{self.name}: has no budget, got {', '.join(f'{k}={v}' for k, v in given.items())}; leave it out")
        if given:
            Budget(**given)

    @property
    def budget(self) -> Budget | None:
        """The budget asked for, or the method's default."""
        if self.keep is None and self.keep_ratio is None and self.average_keep is None:
            return self.default_budget
        return Budget(self.keep, self.keep_ratio, self.average_keep)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        """The places and functions of this method on a model of that geometry."""
        raise NotImplementedError

    @classmethod
    def identity(cls, n: int) -> Method:
        """Settings at which the method must equal the full model bit for bit, for images of at most `n` visual tokens."""
        return cls(keep=n)

    def to_dict(self) -> dict[str, Any]:
        """Returns the name and every setting as plain JSON types; `vtr.method_from` makes the method again, also from JSON or YAML."""
        return json.loads(json.dumps({"name": self.name, **asdict(self)}, default=str))


def with_settings(method: Method, **settings: Any) -> Method:
    """Returns a copy of `method` with some settings changed; a new budget replaces the old one."""
    cleared = dict.fromkeys(BUDGETS) if any(settings.get(k) is not None for k in BUDGETS) else {}
    return replace(method, **{**cleared, **settings})
