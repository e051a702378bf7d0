"""`vtr models`: the checkpoints there are recipes for."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from vtr.cli._common import out, reported
from vtr.models.recipes import list_recipes


@reported
def models(as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False) -> None:
    """List recipes of checkpoints; any other folder or hub id of a supported model type works as well."""
    recipes = list_recipes()
    if as_json:
        out.print_json(json.dumps([{**asdict(r), "file": str(r.file), "source": r.source} for r in recipes]))
        return
    if not recipes:
        out.print("no recipes here: run inside the repository, or install the package")
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "checkpoint", "host", "licence", "GiB", "patches", "visual tokens"):
        table.add_column(column, no_wrap=column in ("name", "checkpoint"))
    for r in recipes:
        rows, cols = r.tokens["patch_grid"]
        views = r.tokens["most_views"]
        tokens = f"{r.tokens['most']}" if views == 1 else f"<= {r.tokens['most']} ({views} views)"
        table.add_row(r.name, r.hub_id, r.host, r.licence, f"{r.memory_gib:g}", f"{rows} x {cols}", tokens)
    out.print(table)
    out.print("GiB: weights alone, stored dtype. Visual tokens: per image, newlines excluded.", style="dim")
