"""Reads plans that `Plan.save` wrote: beside a checkpoint on the disk or on the hub, or anywhere else."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from vtr.planning import Visuals, host_for, make_plan, methods_of
from vtr.plans import PLAN_FILE, Plan
from vtr.types import Method
from vtr.types.errors import Refusal, WrongValue


def load_plan(model: nn.Module, where: str | Path | None = None, *, revision: str | None = None, visuals: Visuals = "each") -> Plan:
    """Returns the plan that lies beside the checkpoint of `model`, or `where`, checked against the model as by `vtr.plan`.

    Nothing reads it without being asked: `vtr.reduced(model, vtr.load_plan(model))`.

    Args:
        model: as for `reduced`.
        where: a file, a folder with a `vtr.json`, or a repository of the hub with one; None = where the model was loaded from.
        revision: of the repository; transformers does not keep the one that the model has.
        visuals: as for `reduced`.

    Raises:
        ValueError: no such file, not a plan, of a model of another family, or with a method or setting that does not exist.
        VtrError: as from `plan`.

    Example:
        >>> vtr.plan(model, "divprune", keep=64).save("my-checkpoint")
        >>> vtr.load_plan(model, "my-checkpoint")
    """
    host = host_for(model, visuals)
    place = getattr(host.model, "name_or_path", "") if where is None else str(where)
    if not place:
        raise WrongValue(f"load_plan: this {type(host.model).__name__} was not loaded from a checkpoint; say where its plan lies")
    file = _local(place) or _of_hub(place, revision)
    made_for, methods = read_plan(file, "load_plan")
    if made_for not in (None, host.name):
        raise WrongValue(f"load_plan: {file}: must be made for a model of {host.name!r}, got one for {made_for!r}; make one with vtr.plan")
    return make_plan(host, methods)


def read_plan(file: Path, who: str) -> tuple[str | None, list[Method]]:
    """Returns the host that a plan was made for, None where the file does not say it, and its methods.

    Args:
        file: JSON of what `Plan.to_dict` returned, as `Plan.save` and `vtr tune` write it.
        who: begins the message of an error.

    Raises:
        ValueError, TypeError: no such file, or not a plan.
    """
    made_by = "give a file that Plan.save or vtr tune made"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not complete JSON ({error})"
        raise WrongValue(f"{who}: {file}: {reason}; {made_by}") from None
    if not isinstance(content, dict) or not content.get("methods"):
        raise WrongValue(f"{who}: {file}: has no methods; {made_by}")
    try:
        return content.get("host"), methods_of(content, {})
    except Refusal as error:
        raise type(error)(f"{who}: {file}: {error}") from error


def _local(place: str) -> Path | None:
    """Returns the file that a path means, None where it can only be a name of the hub."""
    path = Path(place).expanduser()
    if path.is_dir():
        return path / PLAN_FILE
    return path if path.is_file() or path.suffix == ".json" else None


def _of_hub(name: str, revision: str | None) -> Path:
    """Returns the file of a repository, from the cache or the network."""
    from transformers.utils import cached_file

    try:
        return Path(str(cached_file(name, PLAN_FILE, revision=revision)))
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise WrongValue(
            f"load_plan: needs a folder or a repository of the hub with a {PLAN_FILE}, got {name!r} ({reason}); give the path of a file"
        ) from error
