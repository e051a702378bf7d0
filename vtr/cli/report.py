"""`vtr report`: tables from folders of result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtr.cli._common import err, out, reported

BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"


@reported
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `vtr eval --out` filled.")],
    times: Annotated[Path | None, typer.Option(help="Folder of the same experiments without --share-tower, for milliseconds.")] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="Markdown file; what stands between its table marks is replaced, else the file is written.")
    ] = None,
) -> None:
    """Accuracy per family with 95 % intervals, every method against random at its budget."""
    from vtr.eval import results
    from vtr.eval.report import markdown

    cells = [cell for folder in folders for cell in _read(folder)]
    if not cells:
        raise ValueError(f"report: no results in {', '.join(map(str, folders))}; fill a folder with vtr eval first")
    text = markdown(cells, _read(times) if times else [])
    if target is None:
        out.print(text, soft_wrap=True, markup=False)
        return
    old = target.read_text(encoding="utf-8") if target.is_file() else ""
    if BEGIN in old and END in old:
        text = f"{old.split(BEGIN)[0]}{BEGIN}\n\n{text}\n\n{END}{old.split(END)[1]}"
    results.write_atomic(target, text.rstrip() + "\n")
    out.print(f"{len(cells)} results written to {target}", soft_wrap=True)


def _read(folder: Path) -> list[dict]:
    """Contents of a folder's result files; what cannot be trusted is named and left out."""
    from vtr.eval import results

    if not folder.is_dir():
        raise ValueError(f"report: no folder {str(folder)!r}; fill one with vtr eval --out first")
    cells, problems = results.read_folder(folder)
    for problem in problems:
        err.print(f"[yellow]ignored:[/] {problem}", soft_wrap=True)
    return cells
