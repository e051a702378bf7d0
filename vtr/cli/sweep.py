"""`vtr sweep`: a grid of experiments from a YAML file, in this process or on Ray."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vtr.cli._common import Quiet, err, out, refuse_unused, reported
from vtr.cli._watching import Watcher, print_failures
from vtr.types.errors import MissingPackage


@reported
def sweep(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="YAML of the sweep, e.g. eval/sweeps/main-table.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. limit=5 budgets.keep=[64].")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for result files. Default: the sweep's, else out/sweeps/NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Also try the cells again that failed earlier.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the cells, their tokens and their cost.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="`local` starts Ray on this machine, an address joins a cluster. Default: no Ray.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Workers; more than one are Ray's.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run every cell of a sweep that is not finished; stop and start again as you like, at most the running cells are lost.

    A budget `keep` is what every method leaves at the end, as in `vtr eval`; with `equalise: average_keep` in the file, methods that remove only
    inside the LLM get it as a mean over its layers. See docs/sweeps.md.

    Exit code 1: some cell has failed; the others were run.
    """
    from vtr.eval.run.claims import check_locks

    if dry_run:
        refuse_unused(context, "--dry-run", ("file", "overrides", "folder", "dry_run", "quiet"))
    else:
        check_locks("sweep")
    try:
        import pydantic  # noqa: F401
    except ImportError:
        raise MissingPackage.of("sweep:", "pydantic", "eval") from None
    from vtr.eval.run.results import prepare_folder
    from vtr.eval.run.work import run_jobs
    from vtr.eval.sweep.grid import load_sweep

    plan = load_sweep(file, overrides or [], here=not dry_run and ray in (None, "local"))
    folder = folder or plan.folder
    for reason in plan.left_out:
        err.print(f"[yellow]left out:[/] {escape(reason)}", soft_wrap=True)
    if dry_run:
        for reason in plan.elsewhere:
            err.print(f"[yellow]warning:[/] for another machine: {escape(reason)}", soft_wrap=True)
        print_plan(plan, folder)
        return
    prepare_folder(folder)
    with _pool(plan.file.workers, ray, jobs) as workers, Watcher(quiet) as watcher:
        done = run_jobs(plan.jobs, folder, workers, watcher, retry=resume)
    finished = len(plan.jobs) - len(done.failures)
    out.print(
        f"{finished} of {len(plan.jobs)} cells have a result in {folder} ({done.ran} run now); tables: vtr report {folder}", soft_wrap=True
    )
    if done.failures:
        print_failures(done.failures, folder, "" if resume else "; --resume tries them again")
        raise typer.Exit(1)


def _pool(workers: Any, ray: str | None, jobs: int | None) -> AbstractContextManager[Any]:
    """Returns workers in this process, or of Ray where that or several workers are wanted."""
    if ray is None and (jobs or 1) == 1:
        from vtr.eval.run.workers import LocalPool

        return nullcontext(LocalPool())
    from vtr.eval.run.cluster import RayPool

    return RayPool(ray or "local", jobs or 1, workers.cpus, workers.gpus, workers.threads)


def print_plan(plan: Any, folder: Path) -> None:
    """Prints the cells with tokens and cost, and what is finished of them."""
    from rich.table import Table

    from vtr.eval.run.forecast import estimate

    found = estimate(plan.jobs, folder)
    table = Table("model", "cell", "task", "tokens left", "average", "GFLOPs", "samples", "TFLOPs", "", box=None, header_style="bold")
    for job, line in zip(plan.jobs, found.lines, strict=True):
        limits = [f"{name}={value}" for name, value in job.setup.pixels.given.items()]
        table.add_row(
            " ".join([job.setup.model, *limits]),
            job.cell.label,
            job.cell.task.name,
            *_forecast(line.forecast),
            "unknown" if line.samples is None else str(line.samples),
            "unknown" if line.samples is None or line.forecast is None else f"{line.forecast.tflops * line.samples:.4g}",
            "finished" if line.finished else "",
        )
    out.print(table)
    out.print(
        "tokens for images with the most that the model can have, or for the largest of the task where it sets no limit; "
        "FLOPs of tower and prefill, a multiply-add counts once; the tower in full",
        style="dim",
    )
    sizes = sorted({line.forecast.of for line in found.lines if line.forecast is not None and line.forecast.of is not None})
    if sizes:
        said = " and ".join(f"{width} x {height}" for height, width in sizes)
        out.print(f"~: for frames of {said} pixels, which is assumed; every video is taken to have all frames", style="dim")
    scorers = sorted({job.setup.frame_scores for job in plan.jobs if job.setup.frame_scores and job.cell.reads_frame_scores})
    if scorers:
        named = " and ".join(scorers)
        out.print(
            f"{named}: asked about every frame once for all cells that read scores; these FLOPs come on top", style="dim", markup=False
        )
    for model in found.unseen:
        out.print(
            f"{model}: which cells are finished is not known here, its checkpoint or device is not on this machine",
            style="dim",
            markup=False,
        )
    left_out = f" ({len(plan.left_out)} left out, see above)" if plan.left_out else ""
    out.print(f"{len(plan.jobs)} cells{left_out}, {found.finished} finished; {to_go(found)}{found.time}", soft_wrap=True)


def _forecast(found: Any) -> tuple[str, str, str]:
    """Returns tokens left, average tokens and GFLOPs of a cell in words."""
    if found is None:
        return "unknown", "unknown", "unknown"
    bound = ("<= " if found.adaptive else "") + ("~" if found.of else "")
    return f"{bound}{found.retained}", f"{bound}{found.average:.1f}", f"{1000 * found.tflops:.4g}"


def to_go(found: Any) -> str:
    """Returns what the cells that are not finished cost, as far as it is known."""
    of_all = len(found.lines) - found.finished
    if found.unknown and found.unknown == of_all:
        return "unknown TFLOPs to go: how many samples the tasks have, or how large their images are, is not known here"
    more = f" and unknown ones of {found.unknown} cells, of which the samples or their size are not known here" if found.unknown else ""
    return f"{found.tflops:.4g} TFLOPs to go{more}"
