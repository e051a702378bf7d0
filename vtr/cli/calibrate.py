"""`vtr calibrate`: what a method learns from a few samples, written to a file that its settings take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtr.cli._common import Attention, Device, Dtype, Model, Quiet, out, progress, reported

app = typer.Typer(help="Learn a method's settings from a few samples.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def calibrate() -> None:
    """Learn a method's settings from a few samples."""


@app.command("shortv")
@reported
def shortv(
    model: Model,
    target: Annotated[Path, typer.Option("--out", help="YAML file to write, for `--set layers=FILE`.")],
    samples: Annotated[int, typer.Option(help="Prompts, one forward per layer each; the paper uses 40.")] = 40,
    share: Annotated[float, typer.Option(help="Share of the layers to list; the paper freezes 60 %.")] = 0.6,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
) -> None:
    """Rank the LLM's layers by how much freezing visual tokens in them changes the answer (arXiv 2504.00502)."""
    import yaml

    from vtr.calibrate.shortv import layer_order, measure
    from vtr.data.shapes import FAMILIES, PER_FAMILY, split_samples
    from vtr.eval.asking import encode, to_model
    from vtr.eval.results import write_atomic
    from vtr.models.loading import load_model

    most = PER_FAMILY * len(FAMILIES)
    if not 1 <= samples <= most:
        raise ValueError(f"--samples: must be from 1 to {most}, got {samples}")
    if not 0 < share <= 1:
        raise ValueError(f"--share: must be in (0, 1], got {share}; the paper freezes 0.6 of the layers")
    loaded, processor = load_model(model, device=device, dtype=dtype, attention=attention)
    questions = split_samples("validation", limit=-(-samples // len(FAMILIES)))[:samples]
    with progress(quiet) as bars:
        task = bars.add_task("calibrating", total=len(questions))
        prompts = (to_model(encode(processor, [q.question], [[q.image]]), loaded) for q in questions)
        contribution = measure(loaded, prompts, lambda count: bars.advance(task, count))
    order = layer_order(contribution)
    listed = order[: max(round(share * len(order)), 1)].tolist()
    mean = contribution.mean(0)
    content = {
        "layers": listed,
        "contribution": {int(layer): float(f"{mean[layer]:.6g}") for layer in order.tolist()},
        "samples": len(questions),
        "data": "shapes v1, validation scenes",
        "model": model,
    }
    write_atomic(target, yaml.safe_dump(content, sort_keys=False))
    out.print(f"layers by rising contribution: {', '.join(map(str, order.tolist()))}")
    out.print(f"written to {target}: use it as `--method shortv --set layers={target}`", soft_wrap=True)
