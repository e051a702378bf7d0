"""`vtr eval`: accuracy of methods over budgets, tasks and seeds, one result file per cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtr.cli._common import (
    Attention,
    Device,
    Dtype,
    FrameScoresOption,
    MaxPixels,
    MinPixels,
    Model,
    Quiet,
    VisualsOption,
    given_visuals,
    is_given,
    load,
    method_settings,
    out,
    parse_list,
    read_plan,
    reported,
)
from vtr.cli._watching import Watcher
from vtr.registry import method_class
from vtr.types import BUDGETS, VtrError
from vtr.types.errors import WrongValue
from vtr.types.settings import default_settings

if TYPE_CHECKING:
    from vtr.eval.run.setup import Setup


@reported
def eval(
    context: typer.Context,
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for result files; finished cells in it are not run again.")],
    methods: Annotated[str | None, typer.Option(help="Names separated by commas; `full` is the model without reduction.")] = None,
    plans: Annotated[list[Path] | None, typer.Option("--plan", help="A plan with its settings, e.g. of vtr tune; repeatable.")] = None,
    keep: Annotated[str | None, typer.Option(help="Budgets separated by commas: visual tokens left per image.")] = None,
    keep_ratio: Annotated[str | None, typer.Option(help="Instead of --keep: shares left, in (0, 1].")] = None,
    tasks: Annotated[str, typer.Option(help="Names separated by commas.")] = "shapes",
    seeds: Annotated[str, typer.Option(help="Seeds separated by commas, for methods with random choices.")] = "0",
    settings: Annotated[list[str] | None, typer.Option("--set", help="Setting as method.key=value; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples of each family.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once; changes times, not answers.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: the task's.")] = None,
    share_tower: Annotated[
        bool, typer.Option("--share-tower", help="Tower once for all cells that allow it; ms mean nothing then.")
    ] = False,
    visuals: VisualsOption = None,
    frame_scores: FrameScoresOption = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
) -> None:
    """Evaluate methods; stop and start again as you like, at most the running cell is lost."""
    from vtr.eval.run.cells import Cell, plan_cells
    from vtr.eval.run.setup import Setup
    from vtr.eval.tasks import get_task
    from vtr.models.pixels import PixelLimits

    if methods is None and not plans:
        raise WrongValue("eval: needs --methods or --plan, got neither; see vtr list")
    names, own = parse_list(methods, str, "--methods") if methods is not None else [], method_settings(settings or [])
    asked = [get_task(name) for name in parse_list(tasks, str, "--tasks")]
    cells = plan_cells(names, parse_budgets(keep, keep_ratio), asked, parse_list(seeds, int, "--seeds"), own, limit, max_new_tokens)
    for made in map(read_plan, plans or []):
        method, seed = (made[0], getattr(made[0], "seed", None)) if len(made) == 1 else (tuple(made), None)
        cells += [Cell(method, task, seed, limit, max_new_tokens) for task in asked]
    for option in (name for name in ("keep", "keep_ratio", "seeds") if is_given(context, name)):
        if not any(_reads(name, option, own.get(name, {})) for name in names):
            what, shown = ("has random choices" if option == "seeds" else "has a budget"), option.replace("_", "-")
            raise WrongValue(
                f"--{shown}: none of the methods ({', '.join(names) or 'only plans'}) {what} that --set leaves open; leave it out"
            )
    pixels = PixelLimits(min_pixels, max_pixels)
    setup = Setup(model, device, dtype, attention, batch_size, share_tower, pixels, given_visuals(visuals), frame_scores)
    if visuals is not None and not any(cell.task.frames for cell in cells):
        raise WrongValue(f"--visuals: none of the tasks ({tasks}) has videos; leave it out")
    if frame_scores is not None and not any(cell.reads_frame_scores and cell.task.frames for cell in cells):
        asked_of = f"none of the methods ({', '.join(names) or 'only plans'}) reads scores of frames on {tasks}"
        raise WrongValue(f"--frame-scores: {asked_of}; leave it out, or ask quota about a task with videos")
    contents = run_cells(cells, setup, folder, quiet)
    print_rows(contents)


def _reads(name: str, option: str, own: Mapping[str, Any]) -> bool:
    """Tells whether a method's cells depend on `keep`, `keep_ratio` or `seeds`; settings of its own win over them."""
    from vtr.types.naming import FULL

    if name == FULL:
        return False
    if option == "seeds":
        return "seed" in default_settings(method_class(name)) and "seed" not in own
    return method_class(name).takes_budget and not set(BUDGETS) & set(own)


def run_cells(cells: Sequence[Any], setup: Setup, folder: Path, quiet: bool) -> list[dict[str, Any]]:
    """Runs the cells that have no result yet, with progress, and returns the contents of all result files in order.

    Args:
        cells: what to run.
        setup: the model and how it is loaded.
        folder: for result files.
        quiet: without progress.
    """
    from vtr.eval.run import results
    from vtr.eval.run.claims import check_locks
    from vtr.eval.run.forecast import check_cells
    from vtr.eval.run.work import run_jobs
    from vtr.eval.run.workers import Job, LocalPool

    if setup.batch_size < 1:
        raise WrongValue(f"--batch-size: must be at least 1, got {setup.batch_size}")
    check_locks("eval")
    results.prepare_folder(folder)
    pool = LocalPool(lambda setup: load(setup.model, setup.device, setup.dtype, setup.attention, quiet, setup.pixels))
    pool.describe(setup)
    check_cells(setup, cells)
    with Watcher(quiet) as watcher:
        done = run_jobs([Job(setup, cell) for cell in cells], folder, pool, watcher)
    if done.failures:
        job, failure = done.failures[0]
        many = f"{len(done.failures)} of {len(cells)} cells failed, the first" if len(cells) > 1 else "the cell"
        raise VtrError(f"{many} ({job.cell.label}): {failure.error}; details in {folder}/failed, finished cells are kept")
    return [results.read_cell(results.cell_path(folder, wanted)) for wanted in done.fingerprints]


def parse_budgets(keep: str | None, keep_ratio: str | None) -> list[Any]:
    """Returns the budgets from the two options.

    Raises:
        ValueError: both given, or an impossible budget.
    """
    from vtr.types import Budget

    if keep is not None and keep_ratio is not None:
        raise WrongValue(f"budget: give --keep or --keep-ratio, not both (got keep={keep}, keep_ratio={keep_ratio})")
    if keep is not None:
        return [Budget(keep=count) for count in parse_list(keep, int, "--keep")]
    if keep_ratio is not None:
        return [Budget(keep_ratio=share) for share in parse_list(keep_ratio, float, "--keep-ratio")]
    return []


def print_rows(contents: Sequence[dict[str, Any]]) -> None:
    """Prints tables of accuracies, one per task."""
    from rich.table import Table

    from vtr.eval.summary import make_rows

    for task in dict.fromkeys(c["fingerprint"]["task"]["name"] for c in contents):
        rows = make_rows([c for c in contents if c["fingerprint"]["task"]["name"] == task])
        title = f"{rows[0].fingerprint['model']['name']} on {task}"
        columns = ("method", "budget", "tokens", *rows[0].families, "macro", "ms")
        table = Table(*columns, title=title, box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        for row in rows:
            cells = [f"{100 * i.value:.1f}\n[dim]{100 * i.low:.0f}-{100 * i.high:.0f}[/]" for i in (*row.families.values(), row.macro)]
            seeds = f"\n[dim]{len(row.seeds)} seeds[/]" if len(row.seeds) > 1 else ""
            extra = "\n".join(f"[dim]{k}={v}[/]" for k, v in row.changed_settings().items())
            name = row.method + seeds + (f"\n{extra}" if extra else "")
            ms = f"{row.means['latency_ms']:.1f}" if "latency_ms" in row.means else "-"  # not told where the tower is shared
            table.add_row(name, row.budget, f"{row.means['retained']:.0f}", *cells, ms)
        out.print(table)
    out.print("percent with 95 % intervals over samples; tokens: measured at the end of the LLM; ms: per sample, batched", style="dim")
