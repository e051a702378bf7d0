"""Methods and hosts by name.

The modules of `vtr/methods` and `vtr/hosts` are found by scanning the folder; other packages add theirs through the entry-point groups
`vtr.methods` and `vtr.hosts`, or by importing the decorators.
"""

from __future__ import annotations

import fnmatch
import importlib
import logging
import pkgutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from vtr.types import STAGES, Card, Method, check_choices
from vtr.types.errors import WrongType, WrongValue, as_refusals
from vtr.types.naming import closest

_log = logging.getLogger(__name__)
_METHODS: dict[str, type[Method]] = {}
_HOSTS: dict[str, Callable[..., Any]] = {}
_LOADED: set[str] = set()
_LOADING: set[str] = set()
_LOCK = threading.RLock()
_ALIASES = {"prumerge+": "prumerge_plus", "sparsevlm+": "sparsevlm_plus", "globalcom^2": "globalcom2", "globalcom²": "globalcom2"}

M = TypeVar("M", bound=type[Method])
F = TypeVar("F", bound=Callable[..., Any])


def register_method(name: str) -> Callable[[M], M]:
    """Makes a frozen dataclass that extends `vtr.Method` known under `name`; a class decorator.

    Raises:
        ValueError: the name is taken by another class, or is not a lower-case identifier; or `stages` names an unknown one.
        TypeError: the class does not extend `vtr.Method`, is not a frozen dataclass, or has a `card` or `stages` of another type.
    """

    def decorate(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise WrongType(f"register_method: {name!r} must decorate a class that extends vtr.Method, got {cls!r}")
        _check_class(name, cls)
        _add(_METHODS, "method", name, cls)
        cls.name = name
        return cls

    return decorate


def register_host(*model_types: str) -> Callable[[F], F]:
    """Lets `build(model) -> Host | DenseHost` serve models whose `config.model_type` is one of `model_types`; a decorator.

    Models without a config are named by library and class, `"timm:VisionTransformer"`; subclasses are served, too.
    """

    def decorate(build: F) -> F:
        for model_type in model_types:
            _add(_HOSTS, "host", model_type, build)
        return build

    return decorate


def list_methods(pattern: str | None = None, stage: str | None = None) -> list[str]:
    """Lists registered method names, sorted.

    Args:
        pattern: shell pattern over names, e.g. `"prumerge*"`; text without wildcards matches as a substring.
        stage: only methods that act at this stage (a method matches each of its stages).
    """
    if stage is not None and stage not in STAGES:
        raise WrongValue(f"list_methods: unknown stage {stage!r}; one of {', '.join(STAGES)}")
    _load("methods")
    wanted = "*" if pattern is None else pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return sorted(n for n, cls in _METHODS.items() if fnmatch.fnmatch(n, wanted) and (stage is None or stage in cls.stages))


def method_class(name: str) -> type[Method]:
    """Returns the class registered under `name`.

    Raises:
        ValueError: no such method; the message has the three closest names.
    """
    _load("methods")
    if not isinstance(name, str):
        raise WrongType(f"method_class: name must be a string, got {name!r}")
    found = _METHODS.get(_ALIASES.get(name.lower(), name))
    if found is None:
        raise WrongValue(f"unknown method {name!r}{closest(name, list(_METHODS))}; see vtr.list_methods()")
    return found


def create_method(name: str, **settings: Any) -> Method:
    """Returns an instance of a registered method.

    Args:
        name: registry name, e.g. `"fastv"`.
        **settings: fields of the method, e.g. `keep=64`.

    Raises:
        ValueError: unknown method or setting (three closest names), or a value out of range.
        TypeError: a value of the wrong type.
    """
    cls = method_class(name)
    known = [f.name for f in fields(cls)]
    for setting in settings:
        if setting not in known:
            raise WrongValue(f"{cls.name}: unknown setting {setting!r}{closest(setting, known)}; settings: {', '.join(known)}")
    with as_refusals():
        method = cls(**settings)
    check_choices(method, cls.name)
    return method


def method_from(content: Mapping[str, Any]) -> Method:
    """Returns the method that `Method.to_dict` described, also after JSON or YAML.

    Args:
        content: `name`, and settings that are not the default; any others may stand there, too.

    Raises:
        TypeError: not a mapping with a name, or a value of the wrong type.
        ValueError: unknown method or setting (three closest names), or a value out of range.

    Example:
        >>> vtr.method_from({"name": "fastv", "keep": 64})
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("name"), str):
        raise WrongType(f"method_from: content must map 'name' to the name of a method, beside its settings, got {content!r}")
    return create_method(**content)


def find_host(*names: str) -> Callable[..., Any] | None:
    """Returns the builder of the host for the first of these model types or `library:Class` names that has one, or None."""
    _load("hosts")
    return next((_HOSTS[name] for name in names if name in _HOSTS), None)


def list_hosts() -> list[str]:
    """Lists model types with a host, sorted."""
    _load("hosts")
    return sorted(_HOSTS)


def _check_class(name: str, cls: type[Method]) -> None:
    """Refuses a class whose settings, card or stages could not be read later; says what is missing."""
    who = f"register_method: {name!r}"
    if "__dataclass_params__" not in vars(cls):
        raise WrongType(
            f"{who} must decorate a frozen dataclass, got {cls!r}; write @dataclass(frozen=True, kw_only=True) below the decorator"
        )
    if not isinstance(cls.card, Card):
        raise WrongType(f"{who} needs a vtr.Card as its card, got {cls.card!r}")
    if not isinstance(cls.stages, tuple):
        raise WrongType(f'{who} needs a tuple as its stages, got {cls.stages!r}; write stages = ("boundary",)')
    for stage in cls.stages:
        if stage not in STAGES:
            raise WrongValue(f"{who} has an unknown stage {stage!r}{closest(stage, list(STAGES))}")
    missing = [what for what, there in (("stages", cls.stages), ("card", cls.card.title)) if not there]
    if missing:
        _log.warning(
            "method %s has no %s, so vtr list cannot say what it does; see vtr.Card and vtr.Method", name, " and no ".join(missing)
        )


def _add(table: dict[str, Any], kind: str, name: str, value: Any) -> None:
    library, is_class, class_name = name.partition(":")
    if is_class and kind == "host":
        valid = library.isidentifier() and class_name.isidentifier()
    else:
        valid = name.replace("-", "_").isidentifier() and name == name.lower()
    if not valid:
        raise WrongValue(f"register_{kind}: name must be a lower-case identifier, got {name!r}")
    old = table.get(name)
    if old is not None and (old.__module__, old.__qualname__) != (value.__module__, value.__qualname__):
        raise WrongValue(f"register_{kind}: {name!r} is taken by {old.__module__}.{old.__qualname__}; choose another name")
    table[name] = value


def _load(kind: str) -> None:
    """Imports every module of `vtr.<kind>` once, then the entry points; a broken third-party entry point is logged, not fatal.

    Raises:
        ImportError: a module of ours cannot be imported; the next call tries again.
    """
    if kind in _LOADED:
        return
    with _LOCK:  # other threads wait until everything is there
        if kind in _LOADED or kind in _LOADING:  # a module that is being imported asks for what there is
            return
        _LOADING.add(kind)
        try:
            package = importlib.import_module(f"vtr.{kind}")
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                if not module.startswith("_"):
                    importlib.import_module(f"vtr.{kind}.{module}")
            for point in entry_points(group=f"vtr.{kind}"):
                _load_point(point, kind)
            _LOADED.add(kind)
        finally:
            _LOADING.discard(kind)


def _load_point(point: EntryPoint, kind: str) -> None:
    """Imports what an entry point names; one line says when that fails, or when nothing is registered under its name."""
    table = _METHODS if kind == "methods" else _HOSTS
    try:
        point.load()
    except Exception as error:
        said = " ".join(str(error).split())
        _log.warning("entry point %s = %s of vtr.%s cannot be loaded: %s: %s", point.name, point.value, kind, type(error).__name__, said)
        _log.debug("traceback", exc_info=error)
        return
    module = point.module
    own = sorted(name for name, value in table.items() if value.__module__ == module)
    if point.name not in table and (kind == "methods" or not own):
        found = f"; it has {', '.join(own)}" if own else ""
        _log.warning("entry point %s = %s of vtr.%s: %s registers nothing of that name%s", point.name, point.value, kind, module, found)
