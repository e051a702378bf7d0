"""Checks in a few seconds that reduced models compute what they must, with the libraries that are installed here.

Small random models of the real classes run reduced, and unreduced at full length with masks that hide what was removed. The second knows
nothing of how a reduction works: it is told which tokens are left, and hides the others from every layer's attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from vtr.registry import create_method
from vtr.selfcheck.cases import KEEP, Case, TowerTop, dense
from vtr.testing.surroundings import own_settings
from vtr.types import Method

TOLERANCE = 1e-3
"""Largest difference of logits, which are about 4 apart; float32 on a CPU rounds to about 1e-6, a mask or position that is off gives 0.1."""

KIND = {"LLaVA": "llava", "AnyRes": "llava_next"}
"""Families of the checks -> kinds of `vtr.testing.tiny_models`."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked: the largest absolute `difference` of two results (NaN counts as infinite), or the `error` that it ended in."""

    name: str
    passed: bool
    difference: float
    seconds: float
    error: str = ""


def self_check(quick: bool = False) -> list[Check]:
    """Runs the checks on the CPU, whatever the caller's default device, dtype, gradients and random numbers; raises nothing.

    Args:
        quick: only a boundary and an LLM method on one model, under a second; else also towers, merging, freezing, AnyRes, single prompts
            and a ViT without an LLM.
    """
    plans: list[tuple[str, str, str, dict[str, Any]]] = [
        ("boundary method", "LLaVA", "divprune", {"keep": KEEP, "position_ids": "keep"}),
        ("LLM method", "LLaVA", "fastv", {"keep": KEEP, "position_ids": "keep", "layer": 2}),
        ("merging method", "LLaVA", "pool", {"keep": KEEP, "position_ids": "keep"}),
        ("freezing method", "LLaVA", "shortv", {"layers": (1, 2)}),
        ("boundary method", "AnyRes", "divprune", {"keep": KEEP, "position_ids": "keep"}),
        ("LLM method", "AnyRes", "fastv", {"keep": KEEP, "position_ids": "keep", "layer": 2}),
    ]
    cases: list[tuple[str, str, Callable[[], Method]]] = [
        (f"{kind}, {family}", family, partial(create_method, name, **settings)) for kind, family, name, settings in plans
    ]
    checks = []
    with own_settings():
        models: dict[str, Any] = {}
        for kind, family, method in cases[:2] if quick else [*cases, ("tower method, LLaVA", "LLaVA", TowerTop)]:
            case = Case(KIND[family], method, models)
            parts = [("removed = masked", case.removed), ("cached = recomputed", case.cached), ("batch = single", case.single)]
            checks += [_run(f"{kind}: {name}", part) for name, part in (parts[:2] if quick else parts)]
        if not quick and find_spec("timm") is not None:
            checks.append(_run("ViT of timm: a cluster per token = full", dense))
    return checks


def attention_backends() -> dict[str, bool]:
    """Returns the attention backends of transformers, and whether a model can be loaded with them here."""
    from transformers import utils

    known = {"flash_attention_2": "is_flash_attn_2_available", "flash_attention_3": "is_flash_attn_3_available"}
    return {"sdpa": True, "eager": True, **{name: bool(getattr(utils, test, lambda: False)()) for name, test in known.items()}}


def _run(name: str, part: Callable[[], float]) -> Check:
    started, error, difference = time.perf_counter(), "", float("inf")
    try:
        difference = part()
    except Exception as problem:  # whatever another release makes of it is the finding
        error = f"{type(problem).__name__}: {problem}"
    return Check(name, difference <= TOLERANCE, difference, time.perf_counter() - started, error)
