"""`vtr floors`: does an embedded checkpoint reach the floors, and the table for its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtr.cli._common import Attention, Device, Dtype, Quiet, out, parse_list, reported
from vtr.cli.eval import run_cells


@reported
def floors(
    model: Annotated[str, typer.Argument(help="Embedded checkpoint: its folder or name.")] = "tiny-llava",
    folder: Annotated[Path, typer.Option("--out", help="Folder for result files; finished cells are not run again.")] = Path("out/floors"),
    card: Annotated[Path | None, typer.Option(help="Model card to write the table into, e.g. models/tiny-llava/README.md.")] = None,
    against: Annotated[str | None, typer.Option(help="Checkpoint whose reading must be reached, e.g. tiny-llava.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of `random`, separated by commas.")] = "0,1,2",
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples of each family.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
) -> None:
    """Measure full, random and none on shapes and compare with the floors; exit code 1 when one is missed."""
    from rich.table import Table

    from vtr.data import shapes
    from vtr.eval.floors import check_floors, floor_cells, floor_section, update_card
    from vtr.eval.summary import make_rows, percent
    from vtr.eval.tasks import get_task

    cells = floor_cells(get_task("shapes"), parse_list(seeds, int, "--seeds"), limit)
    options = (folder, batch_size, device, dtype, attention, quiet, True)  # scores, not times, so the tower is shared
    rows = make_rows(run_cells(cells, model, *options))
    base = make_rows(run_cells(cells[:1], against, *options))[0] if against else None
    constants = {family: shapes.constant_accuracy(family) for family in rows[0].families}
    found = check_floors(rows, constants, base)

    table = Table("visual tokens", *rows[0].families, "macro", box=None, header_style="bold")
    for row in rows:
        table.add_row(f"{row.method} {row.keep or ''}", *(percent(i) for i in row.families.values()), percent(row.macro))
    table.add_row("best constant", *(f"{value:.1f}" for value in constants.values()), "")
    out.print(table)
    for floor in found:
        out.print(f"{'[green]pass  [/]' if floor.passed else '[red]MISSED[/]'} {floor.rule}: {floor.found}", soft_wrap=True)
    if card:
        update_card(card, floor_section(rows, found, constants))
        out.print(f"written to {card}", style="dim")
    if not all(floor.passed for floor in found):
        raise typer.Exit(1)
