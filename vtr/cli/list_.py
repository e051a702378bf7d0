"""`vtr list`: the methods there are."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vtr.cli._common import out, reported
from vtr.markdown import markdown_table
from vtr.registry import list_methods, method_class
from vtr.types.errors import WrongValue
from vtr.types.naming import closest

COLUMNS = ("method", "stage", "title", "paper", "reads", "needs", "exact budget", "mark")


@reported
def list_(
    pattern: Annotated[str | None, typer.Argument(help="Part of a name, or a shell pattern such as 'prumerge*'.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only methods of this stage: input, tower, boundary, prefill.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table.")] = False,
) -> None:
    """List methods."""
    if as_json and markdown:
        raise WrongValue("list: give --json or --markdown, not both")
    names = list_methods(pattern, stage)
    if pattern is not None and not names:
        raise WrongValue(f"list: no method matches {pattern!r}{closest(pattern, list_methods(stage=stage))}; `vtr list` shows all")
    rows = [facts(name) for name in names]
    if as_json:
        out.print_json(json.dumps(rows))
        return
    if markdown:
        out.print(methods_table(rows), markup=False, soft_wrap=True)
        return
    if not rows:
        out.print(f"no method acts at stage {stage}")
        return
    from rich.table import Table

    table = Table(*COLUMNS, box=None, header_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(row["name"], *_cells(row))
    out.print(table)


def facts(name: str) -> dict[str, Any]:
    """Returns what `vtr list` says about a method, as JSON."""
    cls = method_class(name)
    card = cls.card
    marks = [mark for mark in ("ours", "experimental") if getattr(card, mark)]
    return {
        "name": name,
        "stages": list(cls.stages),
        "title": card.title,
        "paper": card.paper,
        "venue": card.venue,
        "arxiv": card.arxiv,
        "signals": card.signals,
        "cost": card.cost,
        "needs": [need for need in ("cls", "text", "anyres", "video") if getattr(card, f"needs_{need}")],
        "exact": card.exact,
        "adaptive": cls.takes_budget and cls.default_budget is None,
        "marks": marks,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """Returns the columns behind the name."""
    paper = ", ".join(part for part in (row["venue"] or row["paper"], f"arXiv {row['arxiv']}" if row["arxiv"] else "") if part)
    needs = ", ".join({"cls": "CLS", "anyres": "AnyRes"}.get(need, need) for need in row["needs"]) or "-"
    exact = "no, at most" if not row["exact"] else "with keep; else the image decides" if row["adaptive"] else "yes"
    return [", ".join(row["stages"]), row["title"], paper, row["signals"], needs, exact, ", ".join(row["marks"]) or "-"]


def methods_table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table of methods, names linked to their pages."""
    return markdown_table(COLUMNS, [[f"[`{row['name']}`](docs/methods/{row['name']}.md)", *_cells(row)] for row in rows])
