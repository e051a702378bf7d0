"""The command `vtr`: argument parsing and printing; every command is one call into the packages beside this one."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

import vtr
from vtr.cli import bench, calibrate, check, demo, doctor, eval, info, list_, models, report, run, speedup, sweep, tune, ui
from vtr.cli._common import EXIT_CODES

app = typer.Typer(
    name="vtr",
    help="Visual token reduction for pretrained multimodal models, without training.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("eval")(eval.eval)
app.command("sweep")(sweep.sweep)
app.command("report")(report.report)
app.command("bench")(bench.bench)
app.command("speedup")(speedup.speedup)
app.command("tune")(tune.tune)
app.command("ui")(ui.ui)
app.command("list")(list_.list_)
app.command("info")(info.info)
app.command("models")(models.models)
app.command("demo")(demo.demo)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.add_typer(calibrate.app, name="calibrate")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vtr {vtr.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log what happens, and tracebacks of errors, to stderr.")] = False,
) -> None:
    """Options of all commands."""
    shown = logging.StreamHandler()
    shown.addFilter(lambda record: not record.name.startswith("huggingface_hub"))  # has a handler of its own
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", handlers=[shown])
    logging.getLogger("vtr").setLevel(logging.DEBUG if debug else logging.WARNING)
