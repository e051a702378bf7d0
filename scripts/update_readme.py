#!/usr/bin/env python
"""Writes the README's tables of methods and models, and those of docs and its cards: `make readme`.

With --check it only tells whether they are up to date.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vtr  # noqa: E402
from scripts.pages import overview  # noqa: E402
from vtr.cli.list_ import facts, methods_table  # noqa: E402
from vtr.registry import method_class  # noqa: E402


def table() -> str:
    """Returns what `vtr list --markdown` prints of the toolkit's own methods, sorted by stage, then name."""
    own = [facts(name) for name in vtr.list_methods() if method_class(name).__module__.startswith("vtr.methods.")]
    return methods_table(sorted(own, key=lambda row: (vtr.types.STAGES.index(row["stages"][0]), row["name"])))


def main(arguments: list[str]) -> int:
    stale = {path: new for path, new in overview.pages(ROOT, table()).items() if new != path.read_text(encoding="utf-8")}
    if "--check" not in arguments:
        for path, new in stale.items():
            path.write_text(new, encoding="utf-8")
    elif stale:
        print(f"{', '.join(path.name for path in stale)}: tables out of date; run `make readme`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
