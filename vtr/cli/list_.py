"""`vtr list`: the methods there are."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vtr.cli._common import out, reported
from vtr.registry import list_methods, method_class


@reported
def list_(
    pattern: Annotated[str | None, typer.Argument(help="Part of a name, or a shell pattern such as 'prumerge*'.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only methods of this stage: input, tower, boundary, prefill, decode.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table.")] = False,
) -> None:
    """List methods."""
    if as_json and markdown:
        raise ValueError("list: give --json or --markdown, not both")
    rows = [facts(name) for name in list_methods(pattern, stage)]
    if as_json:
        out.print_json(json.dumps(rows))
        return
    if markdown:
        out.print(_markdown(rows), markup=False, soft_wrap=True)
        return
    if not rows:
        out.print("no method matches")
        return
    from rich.table import Table

    table = Table("method", "stage", "what it does", "paper", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(row["name"], ", ".join(row["stages"]), row["title"], _paper(row))
    out.print(table)


def facts(name: str) -> dict[str, Any]:
    """What `vtr list` says about a method, as JSON."""
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
        "needs": [need for need in ("cls", "text", "anyres") if getattr(card, f"needs_{need}")],
        "exact": card.exact,
        "marks": marks,
    }


def _paper(row: dict[str, Any]) -> str:
    parts = [row["venue"] or row["paper"], f"arXiv {row['arxiv']}" if row["arxiv"] else "", *row["marks"]]
    return ", ".join(part for part in parts if part)


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | stage | what it does | paper |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| `{row['name']}` | {', '.join(row['stages'])} | {row['title']} | {_paper(row)} |")
    return "\n".join(lines)
