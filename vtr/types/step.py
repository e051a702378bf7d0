"""What a method does at one place of the model: the places, and the kinds of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vtr.types.errors import WrongType
from vtr.types.naming import named
from vtr.types.settings import check_choices, check_types
from vtr.types.signals import Signal
from vtr.types.view import Kind, View

Stage = Literal["input", "tower", "boundary", "prefill", "decode"]
Action = Literal["remove", "merge", "restore", "freeze", "observe", "input", "attend"]
PositionOption = Literal["keep", "renumber"]
NewlineOption = Literal["rows", "all", "none"]
FrameOption = Literal["each", "all"]

STAGES: tuple[Stage, ...] = ("input", "tower", "boundary", "prefill", "decode")
ACTIONS: tuple[Action, ...] = ("remove", "merge", "restore", "freeze", "observe", "input", "attend")
BOTH: tuple[Kind, ...] = ("image", "video")
VIDEO: tuple[Kind, ...] = ("video",)


class Place:
    """Where a step acts; one of `Input`, `Tower`, `Boundary`, `Layer` and `Decode`."""

    stage: ClassVar[Stage]
    layer: int

    def __post_init__(self) -> None:
        check_types(self, named(self))
        check_choices(self, named(self))


@dataclass(frozen=True)
class Input(Place):
    """Acts on the pixel values in front of the vision tower."""

    stage: ClassVar[Stage] = "input"
    layer: ClassVar[int] = 0  # type: ignore[misc]


@dataclass(frozen=True)
class Tower(Place):
    """Acts inside the vision tower, or inside a ViT without an LLM.

    Args:
        layer: 0-based; tokens are gone from the input of this layer on.
        at: `layer` = at the input of the layer; `mlp` = between its attention and its MLP.
    """

    layer: int
    at: Literal["layer", "mlp"] = "layer"

    stage: ClassVar[Stage] = "tower"


@dataclass(frozen=True)
class Boundary(Place):
    """Acts between the vision tower and the LLM: on the LLM's input tokens, or on the tower's features with `before_projector`."""

    before_projector: bool = False

    stage: ClassVar[Stage] = "boundary"
    layer: ClassVar[int] = 0  # type: ignore[misc]


@dataclass(frozen=True)
class Layer(Place):
    """Acts during prefill at the input of an LLM layer, counted from 0."""

    layer: int

    stage: ClassVar[Stage] = "prefill"


@dataclass(frozen=True)
class Decode(Place):
    """Acts whenever one new token runs through the LLM, in front of a layer counted from 0."""

    layer: int

    stage: ClassVar[Stage] = "decode"


@dataclass(frozen=True)
class Step:
    """Base of the kinds of steps: `Remove`, `Merge`, `Observe`, `Freeze`, `Restore`, `Rescale` and `Attend`.

    Args:
        where: the place.
        select: function of the `View` there; what it returns depends on the kind of step.
        needs: signals that `select` reads from `view.signals`.
    """

    where: Place
    select: Callable[[View], Any] | None = None
    needs: tuple[Signal, ...] = ()

    action: ClassVar[Action]
    places: ClassVar[tuple[type[Place], ...]]

    def __post_init__(self) -> None:
        who = named(self)
        if not hasattr(self, "action"):
            raise WrongType(
                f"{who}: is what all steps have in common, got one without an action; write Remove, Merge, Observe, ... instead"
            )
        if not isinstance(self.where, self.places):
            places = " or ".join(f"{place.__name__}(...)" for place in self.places)
            raise WrongType(f"{who}: where must be {places}, got {self.where!r}")
        if not callable(self.select) and (self.select is not None or self.action not in ("freeze", "restore")):
            raise WrongType(f"{who}: needs a select function of a View, got {self.select!r}")
        if not isinstance(self.needs, tuple) or not all(isinstance(need, Signal) for need in self.needs):
            raise WrongType(f"{who}: needs must be a tuple of signals, got {self.needs!r}; write needs=(signal,) for one")
        check_types(self, who)
        check_choices(self, who)

    @property
    def stage(self) -> Stage:
        """Returns the stage of the place."""
        return self.where.stage

    @property
    def layer(self) -> int:
        """Returns the layer of the place, 0 where it has none."""
        return self.where.layer

    @property
    def at(self) -> Literal["layer", "mlp"]:
        """Returns where inside a tower layer the step acts, see `Tower`."""
        return getattr(self.where, "at", "layer")

    @property
    def side(self) -> Literal["after_projector", "before_projector"]:
        """Returns the side of the projector that a step at the boundary acts on."""
        return "before_projector" if getattr(self.where, "before_projector", False) else "after_projector"

    @property
    def per(self) -> Literal["image", "view"]:
        """Returns whether rows of the View are images with all their views, or single views with their share of the budget."""
        return "image"

    @property
    def on(self) -> tuple[Kind, ...]:
        """Returns the kinds of visuals that the step sees; others pass by as they are."""
        return BOTH

    @property
    def counted(self) -> bool:
        """Returns whether `view.keep` is meant for this step; otherwise it decides how much stays."""
        return True

    @property
    def share(self) -> float:
        """Returns what the step leaves, as the share of the way from keep (0) to all tokens (1)."""
        return 0.0

    @property
    def multiple(self) -> float | None:
        """Returns what the step leaves, as a multiple of keep; None where `share` says it."""
        return None

    @property
    def earlier_keys(self) -> bool:
        """Returns whether keys and values of earlier LLM layers go, too, behind the prefill."""
        return False

    @property
    def proportional(self) -> bool:
        """Returns whether keys weigh `log(size)` in the attention behind the step."""
        return True

    @property
    def grid(self) -> Callable[[tuple[int, int]], tuple[int, int]] | None:
        """Returns the function from a token grid to the smaller one that the step leaves of it, if it leaves a grid."""
        return None

    @property
    def final_norm(self) -> bool:
        """Returns whether `select` calls `view.final_norm`."""
        return False


@dataclass(frozen=True, kw_only=True)
class Remove(Step):
    """Removes the visual tokens that the `Selection` returned by `select` does not keep.

    Args:
        share: what an earlier removal of a schedule leaves, as the share of the way from keep (0) to N (1).
        multiple: the same as a multiple of keep, at most N; instead of `share`.
        on: kinds of visuals that the step sees; others pass by as they are.
        earlier_keys: keys and values of removed tokens also go from the cache of the LLM layers in front, once these have run.
        counted: False = `view.keep` is not meant for this step: it decides how much stays.
        per: rows of the View are images (all their views) or single views with their share of the budget.
        final_norm: `select` calls `view.final_norm`.
    """

    share: float = 0.0
    multiple: float | None = None
    on: tuple[Kind, ...] = BOTH
    counted: bool = True
    per: Literal["image", "view"] = "image"
    final_norm: bool = False
    earlier_keys: bool = False

    action: ClassVar[Action] = "remove"
    places: ClassVar[tuple[type[Place], ...]] = (Tower, Boundary, Layer)


@dataclass(frozen=True, kw_only=True)
class Merge(Step):
    """Removes tokens and gives new values to those that stay, by the `Selection` returned by `select`.

    Args:
        share, multiple, on, counted, per, final_norm: as for `Remove`.
        proportional: keys of merged tokens weigh `log(size)` in the tower's later attention.
        grid: `(rows, cols)` of tokens -> the smaller grid that is left of it; what windowed ViTs have to know before they run.
    """

    share: float = 0.0
    multiple: float | None = None
    on: tuple[Kind, ...] = BOTH
    counted: bool = True
    per: Literal["image", "view"] = "image"
    proportional: bool = True
    grid: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    final_norm: bool = False

    action: ClassVar[Action] = "merge"
    places: ClassVar[tuple[type[Place], ...]] = (Tower, Boundary, Layer)


@dataclass(frozen=True, kw_only=True)
class Observe(Step):
    """Runs `select` for what it notes in `view.memory` and `view.per_token`; removes nothing.

    Args:
        counted: False = `view.keep` is all that is there, not what the method is to leave in the end.
        on, per, final_norm: as for `Remove`.
    """

    on: tuple[Kind, ...] = BOTH
    counted: bool = True
    per: Literal["image", "view"] = "image"
    final_norm: bool = False

    action: ClassVar[Action] = "observe"
    places: ClassVar[tuple[type[Place], ...]] = (Tower, Boundary, Layer)


@dataclass(frozen=True)
class Freeze(Step):
    """Leaves the visual tokens as they are in one LLM layer, which gives the others their keys and values only. Has no `select`."""

    select: None = field(default=None, init=False)
    needs: tuple[()] = field(default=(), init=False)

    action: ClassVar[Action] = "freeze"
    places: ClassVar[tuple[type[Place], ...]] = (Layer,)


@dataclass(frozen=True, kw_only=True)
class Restore(Step):
    """Gives back all tokens that the method's merge found, from the input of the place's layer on and for every output read before that.

    `select` returns their values `(G, n, D)`; without it every token gets its pivot's value.
    """

    per: Literal["image", "view"] = "image"

    action: ClassVar[Action] = "restore"
    places: ClassVar[tuple[type[Place], ...]] = (Tower,)

    @property
    def counted(self) -> bool:
        """Returns False: all tokens come back."""
        return False


@dataclass(frozen=True)
class Rescale(Step):
    """Shows the tower smaller images: `select` returns the new `(rows, cols)` of patches of a view for each row of the View."""

    action: ClassVar[Action] = "input"
    places: ClassVar[tuple[type[Place], ...]] = (Input,)


@dataclass(frozen=True, kw_only=True)
class Attend(Step):
    """Chooses, for every new token, the visual tokens that the layers from the place on attend to; the cache stays whole.

    The View has no values of tokens; its `memory` lives as long as the KV cache. `select` keeps any number of tokens.
    """

    on: tuple[Kind, ...] = BOTH

    action: ClassVar[Action] = "attend"
    places: ClassVar[tuple[type[Place], ...]] = (Decode,)

    @property
    def counted(self) -> bool:
        """Returns False: nothing is removed."""
        return False
