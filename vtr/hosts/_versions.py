"""Names of transformers that differ between its releases, in one place. Supported: 5.17 and newer; tested: see `constraints/tested.txt`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""Keyword of the KV cache in every forward, mask function and output: `cache` from 5.24 on, `past_key_values` before."""

_known: list[str] = []


def cache_keyword() -> str:
    """Returns the keyword under which this transformers takes the KV cache."""
    if not _known:  # not functools.cache, of which torch.compile warns
        from transformers.masking_utils import create_causal_mask

        parameters = inspect.signature(create_causal_mask).parameters
        _known.append(next(name for name in CACHE_NAMES if name in parameters))
    return _known[0]


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """Returns the KV cache among a module's keyword arguments, under the name of today or the one that older code still writes."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


_typed: dict[type, bool] = {}


def takes_layer_type(rotary: Any) -> bool:
    """Whether a rotary module makes one table per type of layer and wants to know which."""
    kind = type(rotary)
    if kind not in _typed:
        _typed[kind] = "layer_type" in inspect.signature(kind.forward).parameters
    return _typed[kind]


def rotary_limit(config: Any) -> int | None:
    """Returns up to how many positions an LLM's rotary frequencies are the same for every prompt, None where they always are. Longer prompts have
    others, by their largest position: dynamic NTK and LongRoPE."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in (given, *given.values()) if isinstance(one, Mapping)]  # of all layers, or by type of layer
    types = {str(one.get("rope_type")): one for one in kinds}
    limits = [one["original_max_position_embeddings"] for name, one in types.items() if name == "longrope"]
    limits += [config.max_position_embeddings for name in types if "dynamic" in name]
    return min(limits, default=None)


def unknown_release() -> str:
    """Returns the end of an error about something that transformers does otherwise than in the releases known here."""
    import transformers

    return (
        f"transformers {transformers.__version__} differs from the releases that vtr was tested with: run `vtr doctor`, and install a tested "
        "release"
    )


def output_cache(output: Any) -> Any:
    """Returns the KV cache of a model's output."""
    return getattr(output, cache_keyword(), None)
