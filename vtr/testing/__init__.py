"""The oracles and the contract, for authors of methods and hosts elsewhere: nothing here needs a clone of the repository.

results = vtr.testing.check_method("my_method")  # contract and oracles, on small random models
results = vtr.testing.check_host("my_family")    # the oracles, on a family that was put into vtr.testing.tiny_models.FAMILIES

The parts: `tiny_models` (families, models, prompts), `reference` (what a reduced model must compute), `compare` and `oracles` (both side by
side), `probes` (small methods, one per mechanism), `contract` (what a method promises), `fake_flash` (FlashAttention without a GPU).

Nothing here needs pytest, and transformers is imported by the first model that is built. docs/testing.md is the page.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtr.testing.checking import Result, check_host, check_method

__all__ = ["Result", "check_host", "check_method"]


def __getattr__(name: str) -> Any:
    """Returns a public name, loaded when it is first used."""
    if name in __all__:
        return globals().setdefault(name, getattr(importlib.import_module("vtr.testing.checking"), name))
    raise AttributeError(f"module 'vtr.testing' has no attribute {name!r}")
