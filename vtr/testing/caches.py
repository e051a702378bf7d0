"""KV caches as this release of transformers names them."""

from typing import Any

from vtr.hosts._versions import cache_keyword, output_cache


def held(cache: Any) -> dict[str, Any]:
    """Returns the keyword argument that gives a model this cache."""
    return {cache_keyword(): cache}


__all__ = ["held", "output_cache"]
