"""Results made up for tests of the report: one function, a cell per call."""

from __future__ import annotations

from typing import Any

import numpy as np

from vtr.eval.summary import Condensed, condense

FAMILIES = ("existence", "text")
NUMBERS = {"retained": 64.0, "average_tokens": 64.0, "visual_tokens": 576.0, "tflops": 0.001, "kv_mib_fp16": 0.5, "latency_ms": 20.0}


def content(
    method: str = "random",
    share: float | dict[str, float] = 0.5,
    *,
    seed: int | None = None,
    count: int = 100,
    shift: int = 0,
    summary: dict[str, Any] | None = None,
    task: str = "shapes",
    families: tuple[str, ...] = FAMILIES,
    conditions: dict[str, Any] | None = None,
    fingerprint: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Content of a result file: the first `share` of the samples of every family right, counted from sample `shift`."""
    samples = []
    for family in families:
        own = share[family] if isinstance(share, dict) else share
        for i in range(count):
            right = (i - shift) % count < round(own * count)
            samples.append({"id": f"{family}/{i:03}", "family": family, "correct": right, "retained": [settings.get("keep") or 64]})
    made = {
        "method": method,
        "settings": settings,
        "seed": seed,
        "model": {"name": "tiny", "sha256": "0"},
        "task": {"name": task, "version": "v1", "limit": None},
        "max_new_tokens": 16,
        "dtype": "float32",
        "attention": "sdpa",
        "device": "cpu",
        "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
    }
    return {
        "fingerprint": {**made, **(fingerprint or {})},
        "conditions": conditions or {},
        "summary": {**NUMBERS, **(summary or {})},
        "samples": samples,
    }


def cell(*args: Any, **settings: Any) -> Condensed:
    """`content`, condensed."""
    return condense(content(*args, **settings))


def table(keeps: tuple[int, ...] = (192, 64)) -> list[Condensed]:
    """Every baseline and one method that is worse than random; `full` right in 95 of 100."""
    found = [cell("full", 0.95, summary={"retained": 576.0}), cell("none", 0.2, keep=None, summary={"retained": 0.0})]
    for keep in keeps:
        found += [cell("random", 0.6, seed=seed, keep=keep, shift=seed) for seed in (0, 1)]
        found += [cell(name, 0.6, keep=keep) for name in ("uniform", "pool", "resize")]
        found.append(cell("fastv", 0.3, keep=keep, layer=2))
    return found


def soft(values: np.ndarray, **settings: Any) -> Condensed:
    """A cell of one family with these outcomes."""
    made = content("random", families=("all",), count=len(values), **settings)
    for sample, value in zip(made["samples"], values, strict=True):
        sample["correct"] = float(value)
    return condense(made)
