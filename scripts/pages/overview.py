"""The tables of the pages of the site that look at all methods: which to choose, pictures, and the list."""

from __future__ import annotations

from pathlib import Path

from scripts.pages.advice import advice, cost_table, needs_table
from scripts.pages.facts import Facts
from vtr.eval.report.marked import with_block
from vtr.markdown import markdown_table
from vtr.registry import list_methods, method_class

CHOOSE, GALLERY = "docs/choose.md", "docs/gallery.md"


def pages(root: Path) -> dict[Path, str]:
    """Returns the pages of a clone with what is generated in them as of this moment: docs/choose.md, docs/gallery.md and the cards."""
    facts = Facts.read(root)
    found = {root / CHOOSE: choose((root / CHOOSE).read_text(encoding="utf-8"), facts)}
    found[root / GALLERY] = with_block((root / GALLERY).read_text(encoding="utf-8"), "gallery", gallery(root))
    for card in sorted((root / "docs" / "methods").glob("*.md")):
        found[card] = with_block(card.read_text(encoding="utf-8"), "use", advice(facts, card.stem))
    return found


def choose(page: str, facts: Facts) -> str:
    """Returns docs/choose.md with its tables."""
    videos = [on for on in facts.models if "video" in on]
    images = [on for on in facts.models if on not in videos]
    for name, models, budget in (
        ("quarter", images, facts.quarter),
        ("few", images, facts.fewest),
        ("quarter-video", videos, facts.quarter),
        ("few-video", videos, facts.fewest),
    ):
        page = with_block(page, name, needs_table(facts, models, budget))
    return with_block(page, "cost", cost_table(facts, images[0]))


def gallery(root: Path) -> str:
    """Returns a table with a picture of what every method retains."""
    body = []
    for name in list_methods():
        picture, cls = f"figures/methods/{name}.png", method_class(name)
        if not (root / "docs" / picture).is_file():
            continue
        facts = f"{', '.join(cls.stages)}; reads {cls.card.signals}"
        body.append([f"![what {name} retains]({picture})", f"**[{name}](methods/{name}.md)**<br>{cls.card.title}<br>{facts}"])
    return markdown_table(["retained", "method"], body)
