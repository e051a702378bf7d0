#!/usr/bin/env python
"""Writes the README's tables of methods and models, and those of docs and its cards: `make readme`.

With --check it only tells whether they are up to date.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vtr  # noqa: E402
from scripts.pages import models, overview  # noqa: E402
from vtr.cli.list_ import facts, methods_table  # noqa: E402
from vtr.eval.report.marked import with_block  # noqa: E402
from vtr.markdown import markdown_table  # noqa: E402
from vtr.registry import method_class  # noqa: E402

STAGES = {"tower": "vision tower", "boundary": "between tower and LLM", "prefill": "inside the LLM"}
"""Stages in words; `input` and `decode` are no method's first stage but for a baseline."""
README, MODELS, METHODS = ROOT / "README.md", ROOT / "docs" / "models.md", ROOT / "docs" / "methods.md"


def table() -> str:
    """Returns what `vtr list --markdown` prints of the toolkit's own methods, sorted by stage, then name."""
    own = [facts(name) for name in vtr.list_methods() if method_class(name).__module__.startswith("vtr.methods.")]
    return methods_table(sorted(own, key=lambda row: (vtr.types.STAGES.index(row["stages"][0]), row["name"])))


def by_stage() -> str:
    """Returns the methods in one line for each stage, with the pages that they have; baselines and those of videos stand by themselves."""
    rows: dict[str, list[str]] = {}
    for name in vtr.list_methods():
        cls = method_class(name)
        if cls.__module__.startswith("vtr.methods."):
            place = "baselines" if "reference row" in cls.card.paper else "videos" if cls.card.needs_video else STAGES[cls.stages[0]]
            rows.setdefault(place, []).append(f"[`{name}`](docs/methods/{name}.md)")
    return markdown_table(
        ["where they act", "methods"],
        [[place, ", ".join(rows[place])] for place in (*STAGES.values(), "videos", "baselines") if place in rows],
    )


def pages() -> dict[Path, str]:
    """Returns the pages with the tables of this moment between their markers."""
    readme = with_block(README.read_text(encoding="utf-8"), "methods", by_stage())
    methods = with_block(METHODS.read_text(encoding="utf-8"), "methods", table().replace("(docs/", "("))
    readme = with_block(readme, "models", models.families_line() + "\n\n" + models.not_hosted_table())
    page = with_block(MODELS.read_text(encoding="utf-8"), "families", models.families_table())
    return {README: readme, METHODS: methods, MODELS: with_block(page, "refused", models.methods_tables()), **overview.pages(ROOT)}


def main(arguments: list[str]) -> int:
    stale = {path: new for path, new in pages().items() if new != path.read_text(encoding="utf-8")}
    if "--check" not in arguments:
        for path, new in stale.items():
            path.write_text(new, encoding="utf-8")
    elif stale:
        print(f"{', '.join(path.name for path in stale)}: tables out of date; run `make readme`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
