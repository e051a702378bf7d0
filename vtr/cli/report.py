"""`vtr report`: tables, plots and checks from folders of result files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.cli._common import Quiet, err, out, progress, refuse_unused, reported
from vtr.types.errors import WrongValue


@reported
def report(
    context: typer.Context,
    folders: Annotated[list[Path], typer.Argument(help="Folders that `vtr eval --out` or `vtr sweep` filled.")],
    form: Annotated[
        str | None, typer.Option("--format", "-f", help="md, csv, latex or html. Default: what --out ends with, else md.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="File; in a Markdown file with table marks only what stands between them is replaced.")
    ] = None,
    block: Annotated[
        str, typer.Option(help="Which marks of the Markdown file are meant: <!-- NAME:begin --> and <!-- NAME:end -->.")
    ] = "tables",
    plots: Annotated[Path | None, typer.Option(help="Folder for the plots as PNG and SVG; html has them inside anyway.")] = None,
    times: Annotated[Path | None, typer.Option(help="Folder of the same experiments without --share-tower, for milliseconds.")] = None,
    speed: Annotated[
        list[Path] | None, typer.Option(help="Record of vtr bench, e.g. eval/speed/NAME.json: prefill, floors and peak memory; repeatable.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Method, or full: tables with the paired difference of every row to its row at the same budget.")
    ] = None,
    timings: Annotated[
        bool, typer.Option("--timings/--no-timings", help="Milliseconds and memory, which are never twice the same.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Scores with 95 % intervals, cost, rankings and plots of what was measured; every method against random at its budget."""
    from vtr.eval.report import build, find_format, read_speed, render, write_figures
    from vtr.eval.report.marked import has_block, with_block
    from vtr.eval.run import results
    from vtr.files import write_atomic

    if not timings:
        refuse_unused(context, "--no-timings", ("block", "folders", "form", "target", "plots", "against", "timings", "quiet"))
    form = find_format(form, target)
    old = target.read_text(encoding="utf-8") if form == "md" and target is not None and target.is_file() else ""
    if block != "tables" and not has_block(old, block):
        marks = f"<!-- {block}:begin --> and <!-- {block}:end -->"
        raise WrongValue(f"--block: no marks {marks} in {target or 'what is printed'}; give --out a Markdown file that has them")
    records = [one for path in dict.fromkeys(speed or []) for one in read_speed(path)]
    cells, problems = _read(folders, quiet)
    if not cells:
        for problem in problems:
            _warn(problem)
        raise WrongValue(f"report: no results in {', '.join(map(str, folders))}; fill a folder with vtr eval first")
    timed, more = _read([times], quiet) if times else ([], [])
    document = build(cells, timed, [*problems, *more], timings, bool(plots) or form == "html", records, against)
    for line in document.guards:
        err.print(f"note: {line}", soft_wrap=True, markup=False, emoji=False)
    for warning in document.warnings:
        _warn(warning)
    if plots:
        drawn = write_figures(document, plots)
        err.print(f"{len(drawn)} plots written to {plots}", soft_wrap=True, markup=False)
    beside = os.path.relpath(plots, target.parent) if plots and target else str(plots or "")
    text = render(document, form, Path(beside).as_posix() if plots else "")
    if target is None:
        typer.echo(text, nl=False)
        return
    if has_block(old, block):
        text = with_block(old, block, f"\n{text}")
    results.prepare_folder(target.parent)
    write_atomic(target, text)
    out.print(f"{len(cells)} results written to {target}", soft_wrap=True, markup=False)


def _read(folders: list[Path], quiet: bool) -> tuple[list[Any], list[str]]:
    """Returns what `read_folders` finds, with progress."""
    from vtr.eval.report import read_folders

    for folder in folders:
        if not folder.is_dir():
            raise WrongValue(f"report: no folder {str(folder)!r}; fill one with vtr eval --out first")
    with progress(quiet) as bars:
        bar = bars.add_task("reading results", total=sum(1 for folder in folders for _ in folder.glob("*.json")))
        return read_folders(folders, lambda: bars.advance(bar))


def _warn(line: str) -> None:
    err.print(f"warning: {line}", style="yellow", soft_wrap=True, markup=False, emoji=False)
