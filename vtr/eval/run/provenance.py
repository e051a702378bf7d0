"""Where a result comes from: library versions, the exact sources that made it, git, and the hardware."""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vtr
from vtr.registry import find_host, list_hosts
from vtr.types import Method

_VERSIONED = ("torch", "transformers", "tokenizers", "pillow", "numpy")
_ALWAYS = ("vtr.reduction", "vtr.eval.run.asking", "vtr.eval.run.setup", "vtr.eval.tasks", "vtr.data.shapes", "vtr.models.loading")
_ALONE = ("vtr.eval.run.runner",)  # what it imports only sums up
_SCORER = "vtr.eval.frame_scores"
_SHOWN = "vtr.viz"  # draws what was answered
_PACKAGE = Path(vtr.__file__).resolve().parent


@cache
def versions() -> dict[str, str | None]:
    """Returns the versions of vtr and of what can change an answer; None for a library that is not installed."""
    return {"vtr": vtr.__version__, **{name: _version(name) for name in _VERSIONED}}


def device_name(device: str) -> str:
    """Returns `cpu`, or the kind with the name of the hardware: `cuda NVIDIA H200`."""
    kind = device.split(":")[0]
    cuda = torch.cuda.is_available() and (kind == "cuda" or device == "auto")
    return f"{kind} {torch.cuda.get_device_name()}" if cuda else kind


def conditions(batch_size: int) -> dict[str, Any]:
    """Returns what may change times but not answers."""
    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "git": git_state(),
    }


@cache
def git_state() -> dict[str, Any] | None:
    """Returns the commit of the checkout that vtr runs from and whether tracked files differ from it; None outside of git.

    For reading, not for comparing: a commit that touches only a page changes it, an edit that is not committed does not. What is compared is
    `code_hash`.
    """
    if not (_PACKAGE.parent / ".git").exists():
        return None
    commit, changes = (_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no", "--", "vtr"))
    return {"commit": commit.strip(), "dirty": bool(changes)} if commit else None


def code_hash(methods: Iterable[Method], model_type: str | None, scorer_type: str | None = None) -> str:
    """Returns the sha256 of the sources that can change an answer: methods, host, engine and tasks with all they import of ours, committed or not.

    Of a method or host of somebody else every module of its top-level package counts, since any of them may be a helper.

    Args:
        methods: that are applied; a new method or an edit of another one changes nothing.
        model_type: of the model, for its host; None = all hosts.
        scorer_type: of the model that scores frames, None where none does.
    """
    kinds = {model_type, scorer_type} - {None} if model_type else list_hosts()
    hosts = [find_host(kind) for kind in kinds if kind]
    modules = {cls.__module__ for method in methods for cls in type(method).__mro__} | {
        host.__module__ for host in hosts if host is not None
    }
    modules |= {_SCORER} if scorer_type else set()
    return _hash_of(tuple(sorted(modules)))


@cache
def _hash_of(modules: tuple[str, ...]) -> str:
    waiting, files = [*_ALWAYS, *(name for module in modules for name in _package_of(module))], {name: _source(name) for name in _ALONE}
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        files[name] = _source(name)
        waiting += [found for found in _imported(name, files[name]) if _file(found)]
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name} {hashlib.sha256(files[name].encode()).hexdigest()}\n".encode())
    return total.hexdigest()


@cache  # parsing the hundred sources of a cell takes a second, and the next cell has nearly the same
def _imported(name: str, source: str) -> list[str]:
    """Returns the dotted names of ours that a module imports: modules and what may be modules."""
    path, found = _file(name), []
    package = name.split(".") if path is None or path.name == "__init__.py" else name.split(".")[:-1]
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or for another Python: it cannot be imported here
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [one for one in found if one.startswith("vtr.") and not one.startswith(_SHOWN)]


def _package_of(module: str) -> list[str]:
    """Returns the names of the modules that change with a method's module: itself; of somebody else's package all, imported so far or not."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return []
    found = set()
    for root in _roots(top) if top != "vtr" else ():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if not any(part.startswith(".") or part == "site-packages" for part in parts):
                found.add(".".join([top, *(parts[:-1] if parts[-1] == "__init__" else parts)]))
    return [module, *sorted(found - {module})]


def _roots(top: str) -> list[Path]:
    """Folders of a top-level package; none where it is a single file."""
    return [_PACKAGE] if top == "vtr" else [Path(root) for root in getattr(sys.modules.get(top), "__path__", ())]


def _file(name: str) -> Path | None:
    """Returns the file of a module of a package, None when it is none."""
    top, *parts = name.split(".")
    bases = [root.joinpath(*parts) for root in _roots(top)]
    places = (path for base in bases for path in (*([base.with_suffix(".py")] if parts else []), base / "__init__.py"))
    return next((path for path in places if path.is_file()), None)


def _source(name: str) -> str:
    path = _file(name)
    if path:
        return path.read_text(encoding="utf-8", errors="replace")
    try:  # a single file, or what was typed into a notebook
        return inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, check=False).stdout
