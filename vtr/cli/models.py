"""`vtr models`: the checkpoints there are recipes for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

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
    for column in ("name", "checkpoint", "host", "licence", "GiB", "a view", "visual tokens", "of a video"):
        table.add_column(column, no_wrap=column in ("name", "checkpoint", "visual tokens", "of a video"))
    for r in recipes:
        table.add_row(r.name, r.hub_id, r.host, r.licence, f"{r.memory_gib:g}", *geometry(r.tokens), of_video(r.tokens))
    out.print(table)
    out.print("GiB: weights alone, stored dtype. A view: its grid of tokens. Visual tokens: of an image, newlines excluded.", style="dim")
    out.print(
        "Of a video: frames that papers show x tokens of a frame; in brackets the pixels that a frame is assumed to have.", style="dim"
    )
    out.print("any: every image has its own; --max-pixels limits it where the processor has such a limit.", style="dim")


def geometry(tokens: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the grid of a view and the visual tokens of an image in words."""
    grid, views, most = tokens.get("patch_grid"), tokens["most_views"], tokens["most"]
    if views > 1:
        said = f"<= {most} ({views} views)"
    else:
        said = f"{most}" if grid else f"{tokens['least']} to {most}" if "least" in tokens else f"<= {most}"
    return "any" if grid is None else f"{grid[0]} x {grid[1]}", said


def of_video(tokens: Mapping[str, Any]) -> str:
    """Returns frames x tokens of a frame in words, nothing for a model without videos."""
    known = tokens.get("video")
    if known is None:
        return "-"
    size = f" ({known['of'][1]}x{known['of'][0]})" if "of" in known else ""
    return f"{known['frames']} x {known['per_frame']:g}{size}"
