"""`vtr speedup`: what a method would gain on this machine, and what limits it, without running a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.cli._common import Device, Dtype, Quiet, Threads, out, parse_settings, reported, spinner
from vtr.types.errors import WrongValue


@reported
def speedup(
    model: Annotated[str, typer.Option("--model", "-m", help="Shape, e.g. llava-1.5-7b; no weights are needed.")],
    method: Annotated[str, typer.Option(help="Name of the method.")],
    keep: Annotated[int, typer.Option(help="Visual tokens left per image.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer; the prefill makes the first token.")] = 32,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Setting of the method as key=value; repeatable.")] = None,
    threads: Threads = None,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Predict prefill, total and memory of a method from its token counts and a calibration of seconds, and say what limits the gain.

    The cost of choosing tokens is not in the prediction; `vtr bench` measures it. See docs/speedup.md.
    """
    import torch

    from vtr.bench.calibration import calibrate
    from vtr.bench.predict import check_keep, full_schedule, planned_schedule, predict, sizes_of, transformers_of
    from vtr.bench.schedule import kept_schedule
    from vtr.bench.session import dtype_of
    from vtr.bench.shapes import SHAPES, build, find_shape
    from vtr.models.loading import check_device
    from vtr.planning import plan
    from vtr.registry import create_method, method_class
    from vtr.types.naming import closest

    if model not in SHAPES:
        raise WrongValue(f"speedup: unknown shape {model!r}{closest(model, SHAPES)}; vtr bench times a folder or a hub id")
    if file is not None and not file.parent.is_dir():
        raise WrongValue(f"--json: no folder {str(file.parent)!r}; make it first")
    place, shape, cls = check_device(device), find_shape(model), method_class(method)
    if place == "auto":
        raise WrongValue("--device: one device is calibrated, got auto; give cpu or cuda")
    check_keep(shape, keep)
    given = parse_settings(settings or [])
    budget = {"keep": keep} if cls.takes_budget and not {"keep", "keep_ratio", "average_keep"} & set(given) else {}
    kind = _dtype(dtype_of, dtype, place, shape.dtype)
    sketch = build(shape, kind, "meta")
    made = plan(sketch, create_method(method, **budget, **given), question="")  # a text, for methods that need one
    if threads:
        torch.set_num_threads(threads)
    full = full_schedule(shape)
    sizes = sizes_of(shape, (full, planned_schedule(shape, made), kept_schedule(full, shape.text, keep)), batch)
    with spinner(f"timing layers of {model}", quiet):
        calibration = calibrate(*transformers_of(shape), *sizes, kind, place)
    weights = sum(parameter.nbytes for parameter in sketch.parameters())
    found = predict(shape, made, keep, batch, new_tokens, calibration, weights, kind.itemsize)
    name = str(kind).removeprefix("torch.")
    _print(
        found, f"{model}, {made.described()}, batch {batch}, {new_tokens} new tokens, {name}, {place}, {torch.get_num_threads()} thread(s)"
    )
    if file is not None:
        facts = {"model": model, "method": made.to_dict()["methods"][0], "keep": keep, "batch": batch, "dtype": name, "device": place}
        measured = {"threads": torch.get_num_threads(), "calibration": calibration.to_dict()}
        _write(file, {**facts, **measured, **found.to_dict()})
        out.print(f"written to {file}", style="dim", soft_wrap=True)


def _dtype(find: Any, name: str, device: str, stored: str) -> Any:
    names = ("auto", "float32", "bfloat16", "float16", "float64")
    if name not in names:
        raise WrongValue(f"--dtype: must be one of {', '.join(names)}, got {name!r}")
    return find(name, device, stored)


def _print(found: Any, title: str) -> None:
    from rich.table import Table

    from vtr.bench.predict import PARTS
    from vtr.bench.shapes import GIB

    three = (found.full, found.reduced, found.floor)
    out.print(title, style="bold", soft_wrap=True, markup=False)
    table = Table("", "full", "reduced", "share", "kept floor", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(label: str, values: list[float], share: str, unit: str) -> None:
        first, second, third = (f"{value:.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}" for value in values)
        table.add_row(label, first, second, share, third)

    names = {"LLM before the cut": f"LLM, {found.cut} layers before the cut", "LLM": "LLM, layers behind it" if found.cut else "LLM"}
    for part in PARTS:
        if part != "LLM before the cut" or found.cut:
            add(names.get(part, part), [one.ms[part] for one in three], f"{100 * found.reduced.ms[part] / found.reduced.total:.0f} %", "ms")
    add("prefill", [one.prefill for one in three], "", "ms")
    add("total", [one.total for one in three], "", "ms")
    add("weights", [one.weight_bytes / GIB for one in three], "", "GiB")
    add("KV cache", [one.kv_bytes / GIB for one in three], "", "GiB")
    add("prefill's peak", [one.peak_bytes / GIB for one in three], "", "GiB")
    out.print(table)
    for of, label in (("reduced", "predicted"), ("floor", "ceiling (kept floor)")):
        prefill, total, memory = (found.factor(part, of) for part in ("prefill", "total", "memory"))
        out.print(f"{label}: prefill {prefill:.2f} times faster, total {total:.2f}; memory {memory:.2f} times less", soft_wrap=True)
    out.print(f"time: {found.limit()}", soft_wrap=True)
    out.print(f"memory: {found.memory_limit()}", soft_wrap=True)
    out.print("not in it: choosing the tokens, and Python between layers; vtr bench measures both", style="dim", soft_wrap=True)
    if found.cuts_tower:
        out.print("the kept floor has the whole tower; a method that cuts inside the tower can be faster", style="dim", soft_wrap=True)
    if found.adaptive:
        out.print(
            "steps of the method decide themselves how much stays and count as removing nothing: the reduced numbers are upper bounds",
            style="dim",
            soft_wrap=True,
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    from vtr.files import write_atomic

    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
