"""Whether the modules of a model take the keyword arguments that the engine reads and writes.

A library that renames one of them would otherwise go unnoticed: a hook would not find what it reads, and what it writes would be ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from vtr.hosts._versions import CACHE_NAMES
from vtr.types import VtrError

TESTED = "5.17 to 5.24"
"""Releases of transformers that the tests have run on."""


def keywords_of(module: Any) -> dict[str, inspect.Parameter] | None:
    """Returns the parameters of a module's forward by name, `**kwargs` included, or None where they cannot be known.

    Decorators, and wrappers set on the instance, are looked through where they say what they wrap; where they do not, the forward of the
    module's class counts.
    """
    for forward in (module.forward, type(module).forward.__get__(module)):
        try:
            parameters = inspect.signature(forward).parameters
        except (TypeError, ValueError):
            continue
        if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
            return dict(parameters)
    return None


def by_name(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns the arguments of a call of `module`, those given by place under the names that its forward has for them."""
    if not args:
        return args, kwargs
    known = keywords_of(module) or {}
    names = [name for name, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return (args, kwargs) if len(names) < len(args) else ((), dict(zip(names, args, strict=False)) | kwargs)


def check_keywords(module: Any, role: str, names: Sequence[str], cache: bool = False) -> None:
    """Refuses a module whose forward lacks an argument.

    Args:
        module: a module with a `forward`.
        role: what it is in the model, for the message.
        names: arguments that it must take by name.
        cache: it must take the KV cache, under any of the names that are known.

    Raises:
        VtrError: naming the arguments and the versions.
    """
    known = keywords_of(module)
    if known is None:
        return
    missing = [repr(name) for name in names if name not in known]
    if cache and not any(name in known for name in CACHE_NAMES):
        missing.append(" or ".join(map(repr, CACHE_NAMES)))
    if missing:
        import transformers

        raise VtrError(
            f"vtr.apply: the {role} ({type(module).__name__}.forward) takes no argument {', '.join(missing)}, got {', '.join(known)}; this is "
            f"transformers {transformers.__version__}, tested are {TESTED}: use one of those, or a model whose {role} takes it"
        )
