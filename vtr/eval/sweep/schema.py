"""The YAML of a sweep: which keys there are and what they may hold.

    models: [tiny-llava]                    # names, folders, hub ids, or {model: NAME, dtype: ..., budgets: ...}
    methods: [full, random, fastv]          # `all`: full and every registered method that fits
    plans: [[{divprune: {keep: 128}}, fastv]]  # several methods as one, in this order
    budgets: {keep: [192, 64]}              # or keep_ratio, or average_keep
    equalise: keep                          # the default; average_keep: methods inside the LLM get `keep` as a mean over its layers
    settings: {fastv: {layer: [2, 3]}}      # a list holds the values to try, all combinations; `all` = every method that has the setting
    tasks: [shapes]
    seeds: [0, 1, 2]

Everything else has a default, see `SweepFile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vtr.eval.tasks import get_task
from vtr.models.loading import ATTENTIONS, DTYPES, find_checkpoint
from vtr.planning import Visuals
from vtr.registry import method_class
from vtr.types import BUDGETS, Budget, VtrError
from vtr.types.errors import WrongValue
from vtr.types.naming import FULL, closest

ALL = "all"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


def _known_method(name: str) -> str:
    return name if name in (FULL, ALL) else method_class(name).name


def _known_task(name: str) -> str:
    get_task(name)
    return name


def _known_model(name: str) -> str:
    try:
        find_checkpoint(name)
    except VtrError as error:
        raise WrongValue(str(error)) from None
    return name


def _known_device(name: str) -> str:
    try:
        return name if name == "auto" else str(torch.device(name)) and name
    except RuntimeError:
        raise WrongValue(f"unknown device {name!r}; write cpu, cuda, cuda:0 or another number, mps, or auto") from None


def _one_of(kind: str, names: Sequence[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise WrongValue(f"unknown {kind} {name!r}{closest(name, list(names))}")
        return name

    return AfterValidator(check)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


def _member(value: Any) -> Any:
    """Returns `fastv` or `{fastv: {layer: 3}}` as a mapping with both."""
    if isinstance(value, str):
        return {"method": value}
    if isinstance(value, dict) and len(value) == 1 and set(value) != {"method"}:
        ((name, settings),) = value.items()
        return {"method": name, "settings": {} if settings is None else settings}
    return value


def _budget(kind: str) -> AfterValidator:
    def check(value: Any) -> Any:
        try:
            Budget(**{kind: value})
        except TypeError as error:
            raise WrongValue(str(error)) from None
        return value

    return AfterValidator(check)


Listed = BeforeValidator(_listed)
MethodName = Annotated[str, AfterValidator(_known_method)]
Dtype = Annotated[str, _one_of("dtype", ("auto", *DTYPES))]
Device = Annotated[str, AfterValidator(_known_device)]
Attention = Annotated[str, _one_of("attention backend", ATTENTIONS)]


class Budgets(_Part):
    """Values of one kind of budget."""

    keep: Annotated[list[Annotated[int, _budget("keep")]], Listed] = []
    keep_ratio: Annotated[list[Annotated[float, _budget("keep_ratio")]], Listed] = []
    average_keep: Annotated[list[Annotated[float, _budget("average_keep")]], Listed] = []

    @model_validator(mode="after")
    def _one_kind(self) -> Budgets:
        given = [name for name in BUDGETS if getattr(self, name)]
        if len(given) != 1:
            raise WrongValue(f"give exactly one of keep, keep_ratio, average_keep, got {' and '.join(given) or 'none of them'}")
        return self

    def values(self) -> list[Budget]:
        """As the library takes them."""
        return [Budget(**{kind: value}) for kind in BUDGETS for value in getattr(self, kind)]


class ModelEntry(_Part):
    """One model; what is left out is as for the whole sweep."""

    model: Annotated[str, AfterValidator(_known_model)]
    methods: Annotated[list[MethodName], Field(min_length=1), Listed] | None = None
    budgets: Budgets | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Listed] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    device: Device | None = None
    dtype: Dtype | None = None
    attention: Attention | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    visuals: Visuals | None = None
    frame_scores: Annotated[str, AfterValidator(_known_model)] | None = None


class Member(_Part):
    """One method of a plan."""

    method: Annotated[str, AfterValidator(lambda name: method_class(name).name)]
    settings: dict[str, Any] = {}


class Workers(_Part):
    """What one worker of Ray gets; `gpus` may be a fraction, None is one where the cluster has any."""

    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0)] | None = None
    threads: Annotated[int, Field(ge=1)] = 1


class SweepFile(_Part):
    """All keys of a sweep.

    `equalise` says what the budgets `keep` mean for methods that remove only inside the LLM: `keep` (the default) leaves that many at the end, as
    `vtr eval` does and as for the others; `average_keep` gives them that mean over the layers, so that rows cost the same. `visuals` says how a
    model that takes images only is shown videos: all frames as one video (`prompt`, the default) or every frame as an image (`each`).
    `frame_scores` is the model that scores frames, for methods that read that.
    """

    models: Annotated[list[Annotated[ModelEntry, BeforeValidator(lambda v: {"model": v} if isinstance(v, str) else v)]], Listed]
    tasks: Annotated[list[Annotated[str, AfterValidator(_known_task)]], Listed]
    methods: Annotated[list[MethodName], Listed] = []
    plans: list[Annotated[list[Annotated[Member, BeforeValidator(_member)]], Field(min_length=2)]] = []
    budgets: Budgets | None = None
    equalise: Literal["keep", "average_keep"] = "keep"
    settings: dict[MethodName, Annotated[list[dict[str, Annotated[list[Any], Listed]]], Listed]] = {}
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Listed] = [0]
    limit: Annotated[int, Field(ge=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    share_tower: bool = False
    device: Device | None = None
    dtype: Dtype = "auto"
    attention: Attention = "sdpa"
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    visuals: Visuals | None = None
    frame_scores: Annotated[str, AfterValidator(_known_model)] | None = None
    workers: Workers = Workers()
    out: str | None = None


def keys_at(place: tuple[str | int, ...]) -> set[str]:
    """Keys that are allowed at a place."""
    models: dict[Any, type[_Part]] = {"budgets": Budgets, "workers": Workers, "models": ModelEntry, "plans": Member}
    inner = next((models[part] for part in reversed(place) if part in models), SweepFile)
    return set(inner.model_fields)
