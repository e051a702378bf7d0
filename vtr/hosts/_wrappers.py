"""The modules of a model, what hosts call it, and which model is inside a wrapper."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from vtr.registry import find_host
from vtr.types import VtrError


def modules_of(model: nn.Module) -> dict[nn.Module, None]:
    """Returns the modules of a model, each once, as the keys of a dict; unlike `model.modules()` it makes no names."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left.extend(module._modules.values())
    return found


def model_type_of(model: nn.Module) -> str | None:
    """Returns `model.config.model_type` where it is a name; a wrapper that forwards attributes has that of what it wraps."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def names_of(model: nn.Module) -> list[str]:
    """Returns what a host may be registered as: the model type, then `library:Class` of the class and its bases."""
    model_type = model_type_of(model)
    return [*([] if model_type is None else [model_type]), *_classes(model)]


def _classes(model: nn.Module) -> list[str]:
    return [f"{cls.__module__.partition('.')[0]}:{cls.__name__}" for cls in type(model).__mro__]


def wrapped(model: nn.Module) -> dict[str, nn.Module]:
    """Returns name -> module of the known models inside a wrapper, the outermost ones; nothing for a model itself.

    Wrappers of torch, PEFT, accelerate and others are neither models of transformers nor of a registered class; those that forward
    attributes show the `config` of what they wrap, others have none.

    Raises:
        VtrError: `DataParallel` over several devices, whose replicas would share one reduction.
    """
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise VtrError(
            f"vtr.apply: torch.nn.DataParallel over {len(model.device_ids)} devices runs replicas, which would share one reduction; use one process "
            "for each device (DistributedDataParallel, accelerate), or device_ids of one device"
        )
    if find_host(*_classes(model)) or _of_transformers(model):
        return {}
    kind = model_type_of(model)
    if kind is None:
        return _outermost(model, lambda child: find_host(*names_of(child)) is not None)
    return _outermost(model, lambda child: _of_transformers(child) and model_type_of(child) == kind)


def _of_transformers(model: nn.Module) -> bool:
    return any(name == "transformers:PreTrainedModel" for name in _classes(model))


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool], prefix: str = "") -> dict[str, nn.Module]:
    """Returns name -> module of the outermost submodules that are `wanted`, each module once."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        inside = {prefix + name: child} if wanted(child) else _outermost(child, wanted, f"{prefix}{name}.")
        found |= {n: m for n, m in inside.items() if m not in found.values()}
    return found
