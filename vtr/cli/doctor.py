"""`vtr doctor`: what is installed here, and whether reduced models compute what they must with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

import vtr
from vtr.cli._common import Quiet, out, reported, spinner


@reported
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Only the checks that `vtr.apply` makes on a release newer than tested.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show versions, devices and attention backends, and check reduced models; exit code 1 when a check fails."""
    found = packages()
    with spinner("checking small random models", quiet or as_json):
        from vtr.selfcheck import attention_backends, self_check

        where, attention, checks = devices(), attention_backends(), self_check(quick)
    if as_json:
        shown = [{**asdict(c), "difference": None if c.difference == float("inf") else c.difference} for c in checks]
        out.print_json(json.dumps({"packages": found, "devices": where, "attention": attention, "checks": shown}))
    else:
        _show(found, where, attention, checks)
    failed = [check for check in checks if not check.passed]
    if failed and not as_json:
        newer = [f"{row['package']} {row['installed']}" for row in found if row["verdict"] == "newer"]
        out.print(
            f"{len(failed)} of {len(checks)} checks failed: results of reduced models are wrong here. "
            + (
                f"Newer than tested: {', '.join(newer)}; install the tested releases."
                if newer
                else "Please report it with `vtr doctor --json`."
            ),
            soft_wrap=True,
        )
    if failed:
        raise typer.Exit(1)


def packages() -> list[dict[str, Any]]:
    """Returns one row per package: `package`, `installed` and `tested` release (None = not installed, not known), and a `verdict`."""
    from vtr.versions import PACKAGES, compared, installed, tested_release

    rows: list[dict[str, Any]] = [{"package": "vtr", "installed": vtr.__version__, "tested": None, "verdict": ""}]
    for name in ("python", *PACKAGES):
        here, known = installed(name), tested_release(name)
        verdict = "not installed" if here is None else "" if known is None else ("as tested", "newer", "older")[compared(here, known)]
        rows.append({"package": name, "installed": here, "tested": known, "verdict": verdict})
    return rows


def devices() -> list[str]:
    """Returns the devices that torch finds, the CPU last."""
    import torch

    found = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu, {torch.get_num_threads()} threads"]


def _show(found: Sequence[dict[str, Any]], where: Sequence[str], attention: dict[str, bool], checks: Sequence[Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("package", "installed", "tested", "", box=None, header_style="bold", pad_edge=False)
    for row in found:
        verdict = {"newer": "[yellow]newer than tested[/]", "older": "[yellow]older than tested[/]"}.get(row["verdict"], row["verdict"])
        table.add_row(row["package"], row["installed"] or "-", row["tested"] or "-", verdict)
    out.print(table)
    out.print()
    out.print(f"[bold]devices[/]    {escape('; '.join(where))}")
    out.print(f"[bold]attention[/]  {', '.join(name if there else f'{name} not installed' for name, there in attention.items())}")
    out.print()
    table = Table("check", "difference", "ms", "", box=None, header_style="bold", pad_edge=False)
    for check in checks:
        result = "[green]pass[/]" if check.passed else f"[red]FAILED[/] {escape(check.error)}"
        table.add_row(check.name, f"{check.difference:.1e}", f"{check.seconds * 1000:.0f}", result)
    out.print(table)
