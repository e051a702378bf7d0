#!/usr/bin/env python
"""Writes the README's table of methods from the registry: `make readme`. With --check it only tells whether the table is up to date."""

import sys
from pathlib import Path

import vtr
from vtr.cli.list_ import facts, methods_table
from vtr.eval.report.marked import with_block
from vtr.registry import method_class

README = Path(__file__).resolve().parents[1] / "README.md"


def table() -> str:
    """Returns what `vtr list --markdown` prints of the toolkit's own methods, sorted by stage, then name."""
    own = [facts(name) for name in vtr.list_methods() if method_class(name).__module__.startswith("vtr.methods.")]
    return methods_table(sorted(own, key=lambda row: (vtr.types.STAGES.index(row["stages"][0]), row["name"])))


def updated(readme: str) -> str:
    """Returns the README with the table of this moment between its markers."""
    return with_block(readme, "methods", table())


def main(arguments: list[str]) -> int:
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if "--check" not in arguments:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        print("README.md: the table of methods is out of date; run `make readme`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
