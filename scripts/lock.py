#!/usr/bin/env python
"""Writes constraints/tested.txt: the versions here of all that `pip install -e .[dev,eval,docs]` brings; with `ui` ui.txt, of `.[dev,ui,video]`."""

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

SET, EXTRAS = ("ui", ("dev", "ui", "video")) if sys.argv[1:] == ["ui"] else ("tested", ("dev", "eval", "docs"))
TARGET = Path(__file__).resolve().parents[1] / "constraints" / f"{SET}.txt"
OURS = "visual-token-reduction"


def versions() -> dict[str, str]:
    """Returns name -> public version of every distribution that ours needs, directly or not; tags of a build (`+cpu`) are left out."""
    found, seen = dict[str, str](), set()
    waiting = [(OURS, extra) for extra in ("", *EXTRAS)]
    while waiting:
        name, extra = waiting.pop()
        seen.add((name, extra))
        installed = distribution(name)
        found[name] = Version(installed.version).public
        for needed in map(Requirement, installed.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                entries = {(canonicalize_name(needed.name), more) for more in ("", *needed.extras)}
                waiting += entries - seen
    del found[OURS]
    return found


def main() -> int:
    try:
        pins = [f"{name}=={version}\n" for name, version in sorted(versions().items())]
    except PackageNotFoundError as error:
        print(f"lock: {error.name} is not installed in {sys.prefix}; run `make test` in this environment first", file=sys.stderr)
        return 1
    made = f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    header = f"# What `pip install -e .[{','.join(EXTRAS)}]` brought where the tests passed. Written by `make lock`: {made}.\n"
    TARGET.write_text(header + "".join(pins), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
