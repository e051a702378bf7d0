"""Which releases of other libraries are installed, and which ones vtr was tested with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "timm",
    "open_clip_torch",
    "safetensors",
    "numpy",
    "pillow",
    "lmms-eval",
    "pydantic",
    "ray",
    "triton",
    "flash-attn",
)
"""Packages whose releases matter to somebody, by the name they are installed by."""


def installed(package: str) -> str | None:
    """Returns the release of a package, or None where it is not installed; nothing is imported."""
    if package == "python":
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tested() -> dict[str, str]:
    """Returns the releases of `constraints/tested.txt`, package -> release; empty where that file is missing."""
    here = Path(__file__).resolve().parent
    for file in (here.parent / "constraints" / "tested.txt", here / "_data" / "constraints" / "tested.txt"):
        if file.is_file():
            pairs = (line.split("#")[0].partition("==") for line in file.read_text(encoding="utf-8").splitlines())
            return {_normal(name): release.split(";")[0].strip() for name, mark, release in pairs if mark}
    return {}


def tested_release(package: str) -> str | None:
    """Returns the release of a package that vtr was tested with, None where that is unknown."""
    return tested().get(_normal(package))


def compared(release: str, with_: str) -> int:
    """Returns 1 where `release` is newer, -1 where it is older, else 0; builds of one release (`+cpu`, `+cu130`) count as equal."""
    from packaging.version import Version

    ours, other = Version(Version(release).public), Version(Version(with_).public)
    return (ours > other) - (ours < other)


def newer_than_tested(package: str = "transformers") -> str | None:
    """Returns a sentence about an installed release that is newer than the tested one, or None."""
    release, known = installed(package), tested_release(package)
    if release is None or known is None or compared(release, known) <= 0:
        return None
    return f"{package} {release} is newer than {known}, the newest that vtr was tested with"


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")
