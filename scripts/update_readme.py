#!/usr/bin/env python
"""Writes the README's table of methods from the registry: `make readme`. With --check it only tells whether the table is up to date."""

import sys
from pathlib import Path

import vtr
from vtr.registry import method_class

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- methods:begin -->\n", "<!-- methods:end -->"


def table() -> str:
    """One row per method of the toolkit itself, sorted by stage, then name."""
    rows = ["| method | stage | title | reads | paper |", "|---|---|---|---|---|"]
    own = [name for name in vtr.list_methods() if method_class(name).__module__.startswith("vtr.methods.")]
    for name in sorted(own, key=lambda name: (vtr.types.STAGES.index(method_class(name).stages[0]), name)):
        cls = method_class(name)
        marks = "".join(f" ({mark})" for mark in ("experimental", "ours") if getattr(cls.card, mark))
        paper = f"{cls.card.venue}, arXiv {cls.card.arxiv}" if cls.card.arxiv else cls.card.paper
        rows.append(
            f"| [`{name}`](docs/methods/{name}.md){marks} | {', '.join(cls.stages)} | {cls.card.title} | {cls.card.signals} | {paper} |"
        )
    return "\n".join(rows) + "\n"


def updated(readme: str) -> str:
    """The README with the table of this moment between its markers."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


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
