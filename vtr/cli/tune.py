"""`vtr tune`: the method, budget and layer that meet a target, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vtr.cli._common import (
    Attention,
    Device,
    Dtype,
    MaxPixels,
    MinPixels,
    Model,
    Quiet,
    Threads,
    err,
    load,
    method_settings,
    out,
    parse_list,
    progress,
    reported,
)
from vtr.cli.eval import parse_budgets
from vtr.types.errors import WrongValue


@reported
def tune(
    model: Model,
    target: Annotated[str, typer.Option(help="A speed factor such as '1.5x', or a loss of accuracy such as '<=1 point'.")],
    methods: Annotated[str, typer.Option(help="Names separated by commas, or all: every method that fits the model.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for all files; what was measured in it is not measured again.")],
    tasks: Annotated[str, typer.Option(help="Names separated by commas; the score is the mean of theirs.")] = "shapes",
    keep: Annotated[str | None, typer.Option(help="Budgets to choose from, separated by commas. Default: ten shares.")] = None,
    keep_ratio: Annotated[str | None, typer.Option(help="Instead of --keep: shares left, in (0, 1].")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Setting as method.key=value, or a JSON list of values to try; repeatable.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Samples of each family, half to search and half to confirm. Default: 200, more where a loss needs more."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin nothing after so long; the best so far is taken.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer that is timed; 1 is the prefill.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once when asked for answers; times are of one prompt.")] = 16,
    share_tower: Annotated[bool, typer.Option("--share-tower", help="Tower once for all answers that allow it; takes memory.")] = False,
    threads: Threads = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
) -> None:
    """Search method, budget and layer for a target, then confirm what was chosen on samples that had no part in it; stop and start as you like.

    Exit code 1: no candidate meets the target. See docs/tune.md.
    """
    import torch

    from vtr.eval.run.claims import check_locks
    from vtr.eval.run.results import prepare_folder
    from vtr.eval.run.setup import Setup
    from vtr.eval.tasks import get_task
    from vtr.models.pixels import PixelLimits
    from vtr.tune.measure import Measurer
    from vtr.tune.output import write
    from vtr.tune.run import tune
    from vtr.tune.space import make_space
    from vtr.tune.split import make_split
    from vtr.tune.target import read_target

    wanted = read_target(target)
    if minutes is not None and not minutes > 0:
        raise WrongValue(f"--minutes: must be above 0, got {minutes:g}")
    asked = [get_task(name) for name in parse_list(tasks, str, "--tasks")]
    split = make_split(asked, limit, wanted)
    setup = Setup(model, device, dtype, attention, batch_size, share_tower, PixelLimits(min_pixels, max_pixels))
    space = make_space(
        setup, parse_list(methods, str, "--methods"), parse_budgets(keep, keep_ratio), method_settings(settings or []), asked[0]
    )
    for reason in space.left_out:
        err.print(f"[yellow]left out:[/] {escape(reason)}", soft_wrap=True)
    check_locks("tune")
    prepare_folder(folder)
    if threads:
        torch.set_num_threads(threads)
    loaded = cache(lambda: load(model, device, dtype, attention, quiet, setup.pixels))
    with progress(quiet) as bars:
        heard = _Heard(bars)
        measurer = Measurer(setup, split, folder, loaded, new_tokens, heard, _say(quiet))
        tuned = tune(space, wanted, measurer, setup, minutes)
    files = write(tuned, folder, _facts(model, [task.name for task in asked], measurer, new_tokens))
    _print(tuned)
    out.print(f"written: {', '.join(map(str, files))}", style="dim", soft_wrap=True, markup=False)
    if tuned.chosen is None:
        raise typer.Exit(1)


class _Heard:
    """Shows the cell that runs, and says once what is in the way; a listener of `vtr.eval.run.work.run_jobs`."""

    def __init__(self, bars: Any) -> None:
        self._bars, self._said = bars, set[str]()
        self._bar: Any = None

    def problem(self, text: str) -> None:
        if text not in self._said:
            err.print(f"[yellow]ignored:[/] {escape(text)}", soft_wrap=True)
        self._said.add(text)

    def planned(self, total: int, finished: int, failed: int) -> None:
        pass

    def started(self, job: Any) -> Callable[[int], None]:
        bar = self._bar = self._bars.add_task(escape(f"{job.cell.label} on {job.cell.task.name}"), total=None)
        return lambda count: self._bars.advance(bar, count)

    def ended(self, job: Any, failure: Any) -> None:
        self._bars.remove_task(self._bar)

    def waiting(self, count: int) -> None:
        self.problem("another process runs what is needed next; waiting for it")


def _say(quiet: bool) -> Callable[[str], None]:
    return lambda line: None if quiet else err.print(line, style="dim", soft_wrap=True, markup=False, highlight=False)


def _facts(model: str, tasks: list[str], measurer: Any, new_tokens: int) -> dict[str, Any]:
    """Returns where and when it was measured."""
    return {"model": model, "tasks": tasks, "timed": f"{new_tokens} new token(s) at batch 1", **measurer.facts()}


def _print(tuned: Any) -> None:
    from rich.table import Table

    from vtr.tune.output import HEAD, caption, rows

    if tuned.points:
        table = Table(*HEAD, box=None, header_style="bold", pad_edge=False)
        for row in rows(tuned):
            table.add_row(*map(escape, row), style="bold" if row[0].startswith("*") else None)
        out.print(table)
        out.print(caption(tuned), style="dim", soft_wrap=True)
    for line in tuned.sentences:
        out.print(line, soft_wrap=True, markup=False)
