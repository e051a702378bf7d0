"""`vtr demo`: what `make demo` runs; the embedded checkpoint on shipped scenes, full against three methods."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.cli._common import Device, Quiet, load, out, parse_list, progress, reported
from vtr.registry import create_method


@reported
def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or name of an embedded checkpoint.")] = "tiny-llava",
    methods: Annotated[str, typer.Option(help="Names separated by commas.")] = "random,divprune,fastv",
    keep: Annotated[int, typer.Option(help="Visual tokens left per image.")] = 64,
    picture: Annotated[Path, typer.Option("--out", help="The contact sheet, a PNG file.")] = Path("out/demo.png"),
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Ask about the shipped scenes with all visual tokens and with few; print a table and draw a contact sheet."""
    chosen = [create_method(name, keep=keep) for name in parse_list(methods, str, "--methods")]
    from vtr.eval.examples import answer_examples, demo_sheet, load_examples
    from vtr.eval.run.results import prepare_folder

    examples = load_examples()
    prepare_folder(picture.parent)
    loaded, processor = load(model, device, "auto", "sdpa", quiet)
    with progress(quiet) as bars:
        bar = bars.add_task("asking", total=len(examples) * (len(chosen) + 1))
        answered = answer_examples(loaded, processor, examples, chosen, lambda count: bars.advance(bar, count))
    _print(answered)
    demo_sheet(answered, keep, Path(model).name).save(picture)
    out.print(f"picture of the retained patches: {picture}", soft_wrap=True)


def _print(answered: list[Any]) -> None:
    from rich.table import Table

    names = [outcome.name for outcome in answered[0].outcomes]
    table = Table("question", "answer", *names, box=None, header_style="bold", pad_edge=False)
    for one in answered:
        marked = [f"[{'green' if one.correct(i) else 'red'}]{o.answer}[/]" for i, o in enumerate(one.outcomes)]
        table.add_row(one.example.question, one.example.answer, *marked)
    table.add_section()
    sides = list(zip(*(one.outcomes for one in answered), strict=True))  # one entry per column
    right = [sum(one.correct(column) for one in answered) for column in range(len(names))]
    table.add_row("correct", "", *(f"{count} of {len(answered)}" for count in right))
    table.add_row("visual tokens", "", *(f"{statistics.fmean(sum(o.retained) for o in side):.0f}" for side in sides))
    table.add_row("mean per LLM layer", "", *(f"{statistics.fmean(o.average_tokens for o in side):.0f}" for side in sides))
    table.add_row("prefill ms (median)", "", *(f"{statistics.median(o.prefill_ms for o in side):.1f}" for side in sides))
    out.print(table)
