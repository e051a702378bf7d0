"""What commands that run cells show: bars on a terminal, a line per cell in a log, failures at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.markup import escape

from vtr.cli._common import err, progress


class Watcher:
    """Shows what `vtr.eval.run.work.run_jobs` tells; use it as a context manager.

    Args:
        quiet: only problems.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._stack = ExitStack()
        self._own: dict[int, Any] = {}
        self._total: Any = None
        self._waiting = False

    def __enter__(self) -> Watcher:
        self._bars = self._stack.enter_context(progress(self._quiet))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def problem(self, text: str) -> None:
        """Prints a line about something that is not trusted."""
        err.print(f"[yellow]ignored:[/] {escape(text)}", soft_wrap=True)

    def planned(self, total: int, finished: int, failed: int) -> None:
        """Begins a bar and says how much there is to do."""
        self._total = self._bars.add_task("all cells", total=total - finished - failed)
        if not self._quiet and finished + failed:
            err.print(f"{finished} of {total} cells are finished already" + (f", {failed} failed earlier" if failed else ""), style="dim")

    def started(self, job: Any) -> Callable[[int], None]:
        """Returns a bar for a cell."""
        bar = self._own[id(job)] = self._bars.add_task(escape(job.cell.label), total=None)
        return lambda count: self._bars.advance(bar, count)

    def ended(self, job: Any, failure: Any) -> None:
        """Takes a cell's bar away; a log gets a line."""
        self._bars.remove_task(self._own.pop(id(job)))
        self._bars.advance(self._total)
        self._waiting = False
        if failure:
            err.print(f"[red]failed:[/] {escape(job.cell.label)} on {escape(job.setup.model)}: {escape(failure.error)}", soft_wrap=True)
        elif not self._quiet and not err.is_terminal:
            err.print(f"finished: {escape(job.cell.label)}", soft_wrap=True)

    def waiting(self, count: int) -> None:
        """Says once that other processes run what is left, until a cell ends."""
        if not self._waiting and not self._quiet:
            err.print(f"{count} cells are being run by another process; waiting for it", style="dim")
        self._waiting = True


def print_failures(failures: Sequence[tuple[Any, Any]], folder: Path, hint: str = "") -> None:
    """Prints how many cells failed, and each reason once."""
    err.print(f"[bold red]error:[/] {len(failures)} cells failed, details in {folder}/failed{hint}", soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for job, failure in failures:
        reasons.setdefault(failure.error, []).append(job.cell.label)
    for reason, labels in reasons.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        err.print(f"  {escape(labels[0])}{more}: {escape(reason)}", soft_wrap=True)
