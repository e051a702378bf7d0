#!/usr/bin/env python
"""Does an embedded checkpoint reach the floors, and the table for its model card: `python scripts/floors.py tiny-llava`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pages.floors import floor_section, floor_table, measure, update_card
from vtr.cli._common import Attention, Device, Dtype, Quiet, out, parse_list, reported
from vtr.cli.eval import run_cells
from vtr.eval.run.setup import Setup


@reported
def floors(
    model: Annotated[str, typer.Argument(help="Embedded checkpoint: its folder or name.")] = "tiny-llava",
    folder: Annotated[Path, typer.Option("--out", help="Folder for result files; finished cells are not run again.")] = Path("out/floors"),
    card: Annotated[Path | None, typer.Option(help="Model card to write the table into, e.g. models/tiny-llava/README.md.")] = None,
    against: Annotated[str | None, typer.Option(help="Checkpoint whose reading must be reached, e.g. tiny-llava.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of `random`, separated by commas.")] = "0,1,2",
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples of each family.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of an image of the benchmark, of which the budgets are shares.")] = 576,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
) -> None:
    """Measure full, random and none on shapes and compare with the floors; exit code 1 when one is missed."""
    setup = Setup(model, device, dtype, attention, batch_size, share_tower=True)  # scores, not times
    run = lambda cells, name: run_cells(cells, replace(setup, model=name), folder, quiet)  # noqa: E731
    measured = measure(run, model, against, parse_list(seeds, int, "--seeds"), limit, tokens)
    out.print(floor_table(measured))
    for floor in measured.floors:
        out.print(f"{'[green]pass  [/]' if floor.passed else '[red]MISSED[/]'} {floor.rule}: {floor.found}", soft_wrap=True)
    if card:
        update_card(card, floor_section(*measured))
        out.print(f"written to {card}", style="dim")
    if not all(floor.passed for floor in measured.floors):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(floors)
