"""`vtr check METHOD`: contract and oracles on one method, also of another package, without a clone."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from vtr.cli._common import Quiet, out, parse_list, parse_settings, reported, spinner
from vtr.registry import create_method, method_class
from vtr.types.errors import WrongValue


@reported
def check(
    method: Annotated[str, typer.Argument(help="Name of a method, see `vtr list`, or of one that --import registers.")],
    imports: Annotated[list[str] | None, typer.Option("--import", help="Module to import first, here or installed. Repeatable.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Setting, key=value, as for `vtr run`. Repeatable.")] = None,
    kinds: Annotated[str | None, typer.Option("--kinds", help="Kinds of models, separated by commas. Default: one per mechanism.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
    quiet: Quiet = False,
) -> None:
    """Check that a method keeps its promises, on small random models; a line per check, exit code 1 when one fails."""
    for module in imports or ():
        _import(module)
    given, cls = parse_settings(settings or []), method_class(method)
    with spinner(f"checking {cls.name}", quiet or as_json):
        from vtr.testing import check_method

        create_method(cls.name, **given)  # refuses unknown settings and wrong values first
        results = check_method(cls, None if kinds is None else parse_list(kinds, str, "--kinds"), settings=given, random=given)
    if as_json:
        out.print_json(json.dumps([asdict(result) for result in results]))
    else:
        _show(results)
    failed = [result for result in results if not result.passed]
    if not as_json:
        rest = "" if failed else ": it keeps what vtr promises of a method"
        out.print(f"{cls.name}: {len(results) - len(failed)} of {len(results)} checks passed{rest}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _import(module: str) -> None:
    """Imports a module, from the working directory too, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module)
    except Exception as error:
        said = " ".join(str(error).split())
        raise WrongValue(f"--import: {module!r} cannot be imported: {type(error).__name__}: {said}; give the name of a module") from error


def _show(results: Sequence[Any]) -> None:
    """Prints a line per check, over all kinds of models, and one more per failure."""
    from rich.markup import escape

    width = max(len(result.check) for result in results)
    for name in dict.fromkeys(result.check for result in results):
        own = [result for result in results if result.check == name]
        failed = [result for result in own if not result.passed]
        word = "[red]FAIL[/]" if failed else "[dim]skip[/]" if all(result.skipped for result in own) else "[green]pass[/]"
        where = ", ".join(result.kind for result in own if result.kind)
        spent = f"{sum(result.seconds for result in own):.1f} s"
        told = f" [dim]{escape(own[0].skipped)}[/]" if own[0].skipped else ""
        out.print(f"{word}  {name:{width}}  {spent:>6}  [dim]{where}[/]{told}", soft_wrap=True)
        for message in dict.fromkeys(result.error for result in failed):
            at = ", ".join(result.kind for result in failed if result.error == message and result.kind)
            out.print(f"      {escape(message)}" + (f" [dim]({at})[/]" if at else ""), soft_wrap=True)
