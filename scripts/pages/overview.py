"""The tables of README and of the pages that look at all methods or models: made of what the code and the measurements say."""

from __future__ import annotations

from pathlib import Path

from scripts.pages import models
from scripts.pages.advice import advice, cost_table, needs_table
from scripts.pages.facts import Facts
from vtr.eval.report.marked import with_block
from vtr.markdown import markdown_table
from vtr.registry import list_methods, method_class

STAGES = {"tower": "vision tower", "boundary": "between tower and LLM", "prefill": "inside the LLM"}
"""Stages in words; `input` and `decode` are no method's first stage but for a baseline."""


def pages(root: Path, methods: str) -> dict[Path, str]:
    """Returns the pages of a clone with what is generated in them as of this moment; `methods` is the table of all methods, linked from the root."""
    facts = Facts.read(root)
    blocks = {
        "README.md": {"methods": by_stage(), "models": models.families_line() + "\n\n" + models.not_hosted_table()},
        "docs/methods.md": {"methods": methods.replace("(docs/", "(")},
        "docs/models.md": {"families": models.families_table(), "refused": models.methods_tables()},
        "docs/choose.md": choice(facts),
        "docs/gallery.md": {"gallery": gallery(root)},
        **{f"docs/methods/{card.stem}.md": {"use": advice(facts, card.stem)} for card in sorted((root / "docs" / "methods").glob("*.md"))},
    }
    found = {}
    for page, own in blocks.items():
        text = (root / page).read_text(encoding="utf-8")
        for name, block in own.items():
            text = with_block(text, name, block)
        found[root / page] = text
    return found


def by_stage() -> str:
    """Returns the methods in one line for each stage, with the pages that they have; baselines and those of videos stand by themselves."""
    rows: dict[str, list[str]] = {}
    for name in list_methods():
        cls = method_class(name)
        if cls.__module__.startswith("vtr.methods."):
            place = "baselines" if "reference row" in cls.card.paper else "videos" if cls.card.needs_video else STAGES[cls.stages[0]]
            rows.setdefault(place, []).append(f"[`{name}`](docs/methods/{name}.md)")
    return markdown_table(
        ["where they act", "methods"],
        [[place, ", ".join(rows[place])] for place in (*STAGES.values(), "videos", "baselines") if place in rows],
    )


def choice(facts: Facts) -> dict[str, str]:
    """Returns the tables of docs/choose.md by the names of their marks."""
    videos = [on for on in facts.models if "video" in on]
    images = [on for on in facts.models if on not in videos]
    return {
        "quarter": needs_table(facts, images, facts.quarter),
        "few": needs_table(facts, images, facts.fewest),
        "quarter-video": needs_table(facts, videos, facts.quarter),
        "few-video": needs_table(facts, videos, facts.fewest),
        "cost": cost_table(facts, images[0]),
    }


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
