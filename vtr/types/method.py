"""The base of every method, and the facts about a method that are not settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from vtr.types.budget import Budget
from vtr.types.errors import WrongValue, as_refusals
from vtr.types.geometry import Geometry
from vtr.types.settings import check_types
from vtr.types.step import FrameOption, NewlineOption, PositionOption, Stage, Step

BUDGETS = tuple(f.name for f in fields(Budget))
"""Settings that are a budget, in the order in which they are listed."""


@dataclass(frozen=True)
class Card:
    """Holds the facts about a method that are not settings; `vtr list`, `vtr info` and the README are made from it."""

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
    needs_video: bool = False
    needs_frame_scores: bool = False
    exact: bool = True
    ours: bool = False
    experimental: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method: the budget and the options that all share. Settings are flat; `asdict` round-trips.

    A method that can act as its authors' released code does has a setting `compat: Literal["authors"] | None = None`.

    Args:
        keep, keep_ratio, average_keep: the budget, at most one given; none given means `default_budget`.
        position_ids: `keep` = survivors keep their original positions; `renumber` = 0, 1, 2, ... after every removal; None = what was published
            (`published_positions`), `keep` where the host cannot renumber.
        newlines: newline tokens kept for `rows` that still have a visual token, `all` or `none`.
        frames: of a method for images, what it sees of a video: `each` = every frame is an image, with its share of the budget; `all` = one image
            with all tokens; None = `frames_unless_told`.
    """

    keep: int | None = None
    keep_ratio: float | None = None
    average_keep: float | None = None
    position_ids: PositionOption | None = None
    newlines: NewlineOption = "rows"
    frames: FrameOption | None = None

    name: ClassVar[str] = ""
    card: ClassVar[Card] = Card(title="", paper="")
    stages: ClassVar[tuple[Stage, ...]] = ()
    takes_budget: ClassVar[bool] = False
    """Whether `keep` and the others may be given; so it is for a class that names a `default_budget`."""
    default_budget: ClassVar[Budget | None] = None
    """The budget when none is given. None of a method that takes one: it is adaptive then, each image decides how many tokens stay."""
    published_positions: ClassVar[PositionOption] = "keep"
    """What `position_ids=None` means: what the published numbers were made with."""

    frames_unless_told: ClassVar[FrameOption] = "all"
    """What `frames=None` means; `each` for methods whose memory grows with the square of the tokens, or that know one thumbnail."""

    frames_only: ClassVar[FrameOption | None] = None
    """The one choice of `frames` that has a meaning for the method; None = both have."""

    removes_all: ClassVar[bool] = False
    """Whether no visual token is left, which a method without a budget cannot say otherwise."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "default_budget" in vars(cls) and "takes_budget" not in vars(cls):
            cls.takes_budget = cls.default_budget is not None

    def __post_init__(self) -> None:
        check_types(self, self.name or type(self).__name__, skip=(*BUDGETS, "position_ids", "newlines", "frames"))
        if getattr(self, "compat", None) not in (None, "authors"):
            raise WrongValue(f"{self.name}: compat must be None or 'authors', got {getattr(self, 'compat', None)!r}")
        if self.position_ids not in ("keep", "renumber", None):
            raise WrongValue(f"{self.name}: position_ids must be 'keep' or 'renumber', got {self.position_ids!r}")
        if self.newlines not in ("rows", "all", "none"):
            raise WrongValue(f"{self.name}: newlines must be 'rows', 'all' or 'none', got {self.newlines!r}")
        if self.frames not in ("each", "all", None):
            raise WrongValue(f"{self.name}: frames must be 'each' or 'all', got {self.frames!r}")
        if self.frames is not None and self.frames_only not in (None, self.frames):
            raise WrongValue(
                f"{self.name}: knows the places of one picture only, so that frames must be {self.frames_only!r}, got {self.frames!r}"
            )
        if self.frames is not None and self.card.needs_video:
            raise WrongValue(f"{self.name}: sees the frames of a video together, got frames={self.frames!r}; leave it out")
        given = {k: getattr(self, k) for k in BUDGETS if getattr(self, k) is not None}
        if not self.takes_budget and given:
            raise WrongValue(f"{self.name}: has no budget, got {', '.join(f'{k}={v}' for k, v in given.items())}; leave it out")
        if given:
            Budget(**given)

    @property
    def budget(self) -> Budget | None:
        """Returns the user's budget, or the method's default; None where it has none, or where each image decides."""
        if self.keep is None and self.keep_ratio is None and self.average_keep is None:
            return self.default_budget
        return Budget(self.keep, self.keep_ratio, self.average_keep)

    def resolved(self, renumber: bool = True, video: bool = False) -> Self:
        """Returns the method with `position_ids` and `frames` as it acts on a host that can renumber positions, or cannot, and has videos,
        or has none."""
        same = copy(self)  # no new objects in settings, which a caller may hold
        if self.position_ids is None:
            object.__setattr__(same, "position_ids", self.published_positions if renumber else "keep")
        if self.frames is None and video and not self.card.needs_video:
            object.__setattr__(same, "frames", self.frames_unless_told)
        return same

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        """Returns what this method does on a model of that geometry, and where."""
        raise NotImplementedError(f"{self.name}: has no steps; write steps(self, geometry) -> tuple[Step, ...]")

    @classmethod
    def identity(cls, n: int) -> Method:
        """Returns settings at which the method must equal the full model bit for bit, for images of at most `n` visual tokens."""
        return cls(keep=n)

    @classmethod
    def timed_settings(cls, llm_layers: int) -> dict[str, Any]:
        """Returns settings beside the budget that `vtr bench` gives the method where nobody does: what times need and no default can know."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Returns the name and every setting as plain JSON types; `vtr.method_from` makes the method again, also from JSON or YAML."""
        return json.loads(json.dumps({"name": self.name, **asdict(self)}, default=str))


def with_settings(method: Method, **settings: Any) -> Method:
    """Returns a copy of `method` with some settings changed; a new budget replaces the old one."""
    cleared = dict.fromkeys(BUDGETS) if any(settings.get(k) is not None for k in BUDGETS) else {}
    with as_refusals():
        return replace(method, **{**cleared, **settings})
