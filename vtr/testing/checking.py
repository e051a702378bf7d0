"""Runs the contract and the oracles on a method, or the oracles on a kind of model, and says what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vtr.testing.contract import CONTRACT, FACTS
from vtr.testing.subject import Broken, Subject, require
from vtr.testing.surroundings import own_settings
from vtr.testing.tiny_models import FAMILIES, KINDS
from vtr.testing.watching import removed_and_cached
from vtr.types import Method
from vtr.types.errors import WrongValue

MASKED, CACHED = "removed equals masked", "cached equals recomputed"
TOLERANCE = 1e-6
"""Largest difference of logits in float64, the sharp test; a mask or a position that is off gives 0.1."""


@dataclass(frozen=True)
class Result:
    """One check of a method, or of a kind of model.

    Args:
        who: the method, or the kind of model for `check_host`.
        check: what was checked.
        kind: kind of model; empty for what needs none.
        passed: whether it holds.
        seconds: how long it took.
        error: `who: rule, got value; what to do` where it does not hold.
        skipped: why it was not checked; then it counts as passed.
    """

    who: str
    check: str
    kind: str
    passed: bool
    seconds: float
    error: str = ""
    skipped: str = ""


def check_method(
    method: str | type[Method] | Method,
    kinds: Sequence[str] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    random: Mapping[str, Any] | None = None,
    raises: bool = False,
) -> list[Result]:
    """Runs the contract and the oracles on a method, with small random models on the CPU; nothing is read from a repository or the network.

    Args:
        method: registered name, class, or an instance, whose settings apart from the budget are used.
        kinds: kinds of models, names of `vtr.testing.tiny_models.FAMILIES`; default one per mechanism that the method's card allows.
        settings: settings without which the method refuses these models, as `layers` of ShortV.
        random: settings with which another seed changes the result, where the default does not depend on the seed.
        raises: raise at the end instead of returning a list with failures in it.

    Returns:
        One result per check and kind of model.

    Raises:
        ValueError: unknown method or kind.
        AssertionError: with `raises`, all failures, a line each.
    """
    unknown = [kind for kind in kinds or () if kind not in FAMILIES]
    if unknown:
        raise WrongValue(f"check_method: unknown kind {unknown[0]!r}; one of {', '.join(FAMILIES)}")
    subject = Subject(method, settings, random)
    name = subject.cls.name
    with own_settings():
        results = [_run(name, check, "", partial(fact, subject)) for check, fact in FACTS.items()]
        for kind in kinds or list(filter(subject.works_on, KINDS)) or [subject.home()]:
            results += [_run(name, check, kind, partial(promise, subject, kind)) for check, promise in CONTRACT.items()]
            results += _oracles(subject, kind)
    failed = [result.error for result in results if not result.passed]
    if failed and raises:
        raise AssertionError("\n".join(failed))
    return results


def check_host(kind: str) -> list[Result]:
    """Runs every oracle on a kind of model in float64: what an author of a host puts into `FAMILIES`.

    Raises:
        ValueError: unknown kind.
    """
    from vtr.testing.compare import Setup
    from vtr.testing.oracles import ORACLES, judged, tolerance

    if kind not in FAMILIES:
        raise WrongValue(
            f"check_host: unknown kind {kind!r}; one of {', '.join(FAMILIES)}, or put yours into vtr.testing.tiny_models.FAMILIES"
        )
    setup, limit = Setup(kind, dtype=torch.float64), partial(tolerance, dtype=torch.float64, kind=kind)

    def hold(name: str) -> None:
        found = judged(name, setup)
        assert found <= limit(name), f"{kind}: {name} must hold within {limit(name):g}, got a difference of {found:.3g}"

    with own_settings():
        titles = {name: (oracle.__doc__ or name).partition("\n")[0].rstrip(".") for name, oracle in ORACLES.items()}
        return [_run(kind, title, kind, partial(hold, name)) for name, title in titles.items()]


def _oracles(subject: Subject, kind: str) -> list[Result]:
    """Two results of one computation: removed = masked, cached = recomputed."""
    found: list[float] = []

    def removed() -> None:
        found.extend(removed_and_cached(subject.method(7, kind), kind))
        _close(subject, found[0], "a reduced model must compute what the full one does with hidden keys")

    def cached() -> None:
        _close(subject, found[1], "decoding with the shortened cache must equal one pass with hidden keys")

    first = _run(subject.cls.name, MASKED, kind, removed)
    if found:
        return [first, _run(subject.cls.name, CACHED, kind, cached)]
    return [first]


def _close(subject: Subject, apart: float, rule: str) -> None:
    way_out = "what `select` returns must not depend on anything but its View"
    require(apart <= TOLERANCE, subject, f"{rule}, within {TOLERANCE:g}, got {apart:.3g}", way_out)


def _run(who: str, name: str, kind: str, check: Callable[[], None]) -> Result:
    started, error, skipped = time.perf_counter(), "", ""
    try:
        check()
    except NotImplementedError as reason:
        skipped = str(reason) or "not implemented"
    except Broken as broken:
        error = str(broken)
    except AssertionError as broken:
        error = str(broken) if str(broken).startswith(f"{who}:") else f"{who}: {name}, got {broken or 'a failed assertion'}"
    except Exception as problem:  # whatever a method or a host makes of it is the finding
        error = f"{who}: {name}, got {type(problem).__name__}: {' '.join(str(problem).split())}"
    return Result(who, name, kind, not error, time.perf_counter() - started, error, skipped)
