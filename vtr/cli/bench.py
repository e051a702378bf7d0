"""`vtr bench`: times of methods against the full model and the floors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.cli._common import (
    Attention,
    Device,
    Dtype,
    MaxPixels,
    MinPixels,
    Quiet,
    Threads,
    method_settings,
    out,
    parse_list,
    progress,
    refuse_unused,
    reported,
    spinner,
)
from vtr.types.errors import WrongValue

SAMPLES = 5
USED = {
    "--model": (
        *("model", "methods", "keep", "batch", "new_tokens", "repeats", "minutes", "floors", "compiled", "schedule", "settings"),
        *("threads", "min_pixels", "max_pixels", "file", "device", "dtype", "attention", "quiet"),
    ),
    "--ops": ("ops", "methods", "repeats", "longest", "threads", "file", "device", "dtype", "quiet"),
}
"""Parameters that each of the things to do reads."""


@reported
def bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Shape with random weights, folder, hub id, or a name of `vtr models`.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Names separated by commas, or all: every method that can run on this model; --ops: whose selections.")
    ] = "all",
    keep: Annotated[str, typer.Option(help="Visual tokens left per image, separated by commas.")] = "64",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    new_tokens: Annotated[str, typer.Option(help="Answer lengths, separated by commas; the prefill makes the first token.")] = "1,64",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count; one more warms up.")] = 5,
    minutes: Annotated[float | None, typer.Option(help="Begin no further round after so long.")] = None,
    floors: Annotated[bool, typer.Option("--floors/--no-floors", help="Run the kept floor and the schedule floors too.")] = True,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Answers with a compiled decode step on a static cache too; compiling is not counted.")
    ] = False,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Trained checkpoint whose counts data-dependent methods follow on random weights; own: they count for themselves."
        ),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Setting of a method as method.key=value; repeatable.")] = None,
    ops: Annotated[
        bool, typer.Option("--ops", help="Time selection functions by themselves, and methods' selections beside plain references.")
    ] = False,
    longest: Annotated[float, typer.Option(help="--ops: sizes that would take more seconds are left out.")] = 5.0,
    threads: Threads = None,
    file: Annotated[Path | None, typer.Option("--json", help="Record to write, e.g. eval/speed/NAME.json.")] = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
) -> None:
    """Time methods against the full model, the kept floor and the schedule floor; or selection functions by themselves."""
    import torch

    from vtr.bench.session import Asked
    from vtr.models.loading import check_attention, check_device
    from vtr.models.pixels import PixelLimits

    if model is None and not ops:
        raise WrongValue("bench: nothing to do; give --model or --ops")
    if ops and model is not None:
        raise WrongValue(f"bench: --ops and --model are timed one by one, got both (--model {model}); give one of them")
    mode, way = ("--ops", "; models are timed with --model") if ops else ("--model", "")
    refuse_unused(context, mode, USED[mode], way)
    if file is not None and not file.parent.is_dir():
        raise WrongValue(f"--json: no folder {str(file.parent)!r}; make it first")
    if threads:
        torch.set_num_threads(threads)
    place = check_device(device)
    asked = Asked(
        tuple(part.strip() for part in methods.split(",")),
        _numbers(keep, "--keep"),
        _numbers(batch, "--batch"),
        _numbers(new_tokens, "--new-tokens"),
        repeats,
        floors,
        minutes,
        method_settings(settings or []),
        compiled,
    )
    for name in asked.settings:
        if name not in asked.names:
            raise WrongValue(f"--set: {name!r} is not among the methods that are run ({', '.join(asked.names)}); leave it out")
    if compiled and max(asked.new_tokens) < 2:
        raise WrongValue(f"--compiled: an answer of one token has no decode step, got --new-tokens {new_tokens}; give a longer one")
    if ops:
        _ops(place, dtype, repeats, longest, None if asked.methods == ("all",) else asked.methods, file, quiet)
    if model is not None:
        limits = PixelLimits(min_pixels, max_pixels)
        _model(model, asked, place, dtype, check_attention(attention), schedule, limits, file, quiet)


def _model(
    name: str, asked: Any, device: str, dtype: str, attention: str, schedule: str | None, limits: Any, file: Path | None, quiet: bool
) -> None:
    from vtr.bench import shapes
    from vtr.bench.record import to_text
    from vtr.bench.session import ALL, bench_model, dtype_of, find_counts, tokens_of
    from vtr.models.loading import find_checkpoint, identify

    if ALL not in asked.methods:
        asked.names  # noqa: B018  refuses unknown names before anything is loaded
    counts = None
    if name in shapes.SHAPES:
        for option, value in limits.given.items():
            raise WrongValue(f"{option}: shape {name!r} has images of one size, got {value}; leave it out, or give a checkpoint")
        shape = shapes.find_shape(name)
        chosen = dtype_of(dtype, device, shape.dtype)
        shapes.check_fits(shape, chosen, device, max(asked.batches), max(asked.new_tokens))
        with spinner(f"making {name}", quiet):
            model = shapes.build(shape, chosen, device, attention)
        pool = lambda size: shapes.prompts(shape, chosen, device, size, _pool_size(asked))  # noqa: E731
        facts = {"name": name, "random": True, "tokens": shape.tokens}
        source = schedule or ("tiny-llava-next" if shape.anyres else "tiny-llava")
        if source != "own":
            with spinner(f"counts of {source}", quiet):
                trained, processor = _trained(source, device, dtype, attention)
                prompts = _real_prompts(trained, processor, 1, SAMPLES)
                counts = find_counts(model, asked, shape.tokens, source, trained, prompts, tokens_of(trained, prompts[0]))
                del trained
    else:
        if schedule is not None:
            raise WrongValue(f"--schedule: is for shapes with random weights, got --model {name}, which counts for itself; leave it out")
        model, processor = _trained(name, device, dtype, attention, limits)
        pool = lambda size: _real_prompts(model, processor, size, _pool_size(asked))  # noqa: E731
        tokens = tokens_of(model, pool(1)[0])
        facts = {"name": identify(find_checkpoint(name))["name"], "random": False, "tokens": tokens, **limits.given}
    with progress(quiet) as bars:
        task = bars.add_task(name, total=None)
        save = lambda record: _write(file, to_text(record)) if file else None  # noqa: E731
        advance = lambda what: bars.update(task, advance=1, description=f"{name}: {what}")  # noqa: E731
        record = bench_model(model, facts, pool, asked, counts, save, advance)
    _print_cells(record, file)


def _trained(name: str, device: str, dtype: str, attention: str, limits: Any = None) -> tuple[Any, Any]:
    from vtr.models.loading import load_model

    return load_model(name, device, dtype, attention, pixels=limits)


def _real_prompts(model: Any, processor: Any, size: int, count: int) -> list[dict[str, Any]]:
    """Batches of scenes of `shapes`, all with one question so that prompts have one length."""
    from vtr.data.shapes import split_samples
    from vtr.eval.run.asking import encode, to_model

    samples = split_samples("validation", limit=-(-size * count // 5))
    images = [sample.image for sample in samples[: size * count]]
    question = samples[0].question
    batches = [images[i * size : (i + 1) * size] for i in range(count)]
    return [dict(to_model(encode(processor, [question] * size, [[image] for image in own]), model)) for own in batches]


def _pool_size(asked: Any) -> int:
    """Returns the different batches of prompts: one per round, four at most."""
    return min(asked.repeats + 1, 4)


def _ops(device: str, dtype: str, repeats: int, longest: float, methods: tuple[str, ...] | None, file: Path | None, quiet: bool) -> None:
    import torch

    from vtr.bench.ops import WIDTH, time_ops
    from vtr.bench.record import environment, make_record, to_text
    from vtr.bench.selections import time_selections
    from vtr.bench.session import dtype_of
    from vtr.bench.tables import ops_table, selections_table

    chosen = dtype_of(dtype, device, "float16")
    with progress(quiet) as bars:
        task = bars.add_task("ops", total=None)
        step = lambda what: bars.update(task, advance=1, description=what)  # noqa: E731
        chosen_ones = time_selections(device, chosen, repeats, methods, advance=step, longest_s=longest)
        rows = time_ops(device, chosen, repeats, longest_s=longest, advance=step) if methods is None else []
    name = str(chosen).removeprefix("torch.")
    record = make_record("ops", environment(torch.device(device)), width=WIDTH, dtype=name, rows=rows, selections=chosen_ones)
    for head, body in (ops_table(rows), selections_table(chosen_ones)):
        if body:
            _print_table(head, body)
    if file:
        _write(file, to_text(record))
        out.print(f"written to {file}", style="dim", soft_wrap=True)


def _print_cells(record: dict[str, Any], file: Path | None) -> None:
    from vtr.bench.tables import compiled_cell, heads, lines, not_compiled

    model, facts = record["model"], record["environment"]
    out.print(f"{model['name']}, {model['dtype']}, {model['attention']}, {facts['device']}, {facts['clock']}", style="bold", soft_wrap=True)
    for cell in record["cells"]:
        out.print(f"\nkeep {cell['keep']} of {model['tokens']}, batch {cell['batch']}", style="bold")
        _print_table(heads(cell), lines(cell))
        compiled = compiled_cell(cell)
        if compiled is not None:
            out.print("decode step compiled on a static cache", style="dim")
            _print_table(heads(compiled), lines(compiled))
        for name, reason in not_compiled(cell).items():
            out.print(f"not compiled: {name}: {reason}", style="yellow", soft_wrap=True, markup=False)
    if record["counts"] and record["counts"]["shares"]:
        out.print(f"counts measured on {record['counts']['source']}: {', '.join(record['counts']['shares'])}", style="dim", soft_wrap=True)
    for method, reason in record["refused"].items():
        out.print(f"not run: {method}: {reason}", style="yellow", soft_wrap=True, markup=False)
    if file:
        out.print(f"written to {file}", style="dim", soft_wrap=True)


def _print_table(head: list[str], body: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(*head, box=None, header_style="bold", pad_edge=False)
    for line in body:
        table.add_row(*line)
    out.print(table)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    found = parse_list(text, int, option)
    if min(found) < 1:
        raise WrongValue(f"{option}: numbers must be at least 1, got {text!r}")
    return tuple(found)


def _write(path: Path, text: str) -> None:
    from vtr.files import write_atomic

    write_atomic(path, text)
