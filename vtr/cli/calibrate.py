"""`vtr calibrate`: what a method learns from a few samples, written to a file that its settings take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    from vtr.eval.asking import encode, to_model
    from vtr.eval.results import write_atomic
    from vtr.models.loading import load_model

    questions = _validation(samples)
    if not 0 < share <= 1:
        raise ValueError(f"--share: must be in (0, 1], got {share}; the paper freezes 0.6 of the layers")
    loaded, processor = load_model(model, device=device, dtype=dtype, attention=attention)
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


@app.command("expedit")
@reported
def expedit(
    model: Model,
    target: Annotated[Path, typer.Option("--out", help="YAML file to write, or a recipe to add it to; for `--set tau=FILE`.")],
    samples: Annotated[int, typer.Option(help="Images, one forward each.")] = 8,
    alpha: Annotated[int | None, typer.Option(help="Blocks at full resolution. Default: 10 of 24.")] = None,
    grid: Annotated[str, typer.Option(help="Clusters as ROWSxCOLS, or their share of each side of the token grid.")] = "0.7",
    window: Annotated[int, typer.Option(help="Odd, in cells of the smaller grid.")] = 5,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
) -> None:
    """Find the tau that suits the features of an encoder (arXiv 2210.01035)."""
    import yaml

    from vtr.calibrate.expedit import measure_tau
    from vtr.eval.results import write_atomic

    questions = _validation(samples)
    sides = grid.lower().split("x")
    try:
        clusters = float(grid) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
    except ValueError:
        raise ValueError(f"--grid: must be ROWSxCOLS or a share in (0, 1], got {grid!r}; 28x28 or 0.7") from None
    content = yaml.safe_load(target.read_text(encoding="utf-8")) if target.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"--out: {target} is not a file of keys; name a new file or a recipe")
    loaded, batches = _with_images(model, questions, device, dtype, attention)
    with progress(quiet) as bars:
        task = bars.add_task("calibrating", total=len(questions))
        tau = measure_tau(loaded, batches, lambda count: bars.advance(task, count), alpha=alpha, grid=clusters, window=window)
    found = {
        "tau": float(f"{tau:.4g}"),
        "alpha": alpha,
        "grid": clusters if isinstance(clusters, float) else list(clusters),
        "window": window,
    }
    content.setdefault("settings", {})["expedit"] = found
    if "hub_id" not in content:
        content |= {"samples": len(questions), "data": "shapes v1, validation scenes", "model": model}
    write_atomic(target, yaml.safe_dump(content, sort_keys=False))
    out.print(f"tau {found['tau']:.4g}, written to {target}: use it as `--method expedit --set tau={target}`", soft_wrap=True)


def _with_images(model: str, questions: Any, device: str | None, dtype: str, attention: str) -> tuple[Any, Any]:
    """The model, dense or with an LLM, and one input per question."""
    import json

    import numpy as np

    config = Path(model) / "config.json"
    if config.is_file() and "architecture" in json.loads(config.read_text(encoding="utf-8")):
        from vtr.models.dense import load_dense
        from vtr.models.loading import check_device

        dense = load_dense(model, check_device(device))
        return dense, (dense.prepare([np.asarray(q.image)]) for q in questions)
    from vtr.eval.asking import encode, to_model
    from vtr.models.loading import load_model

    loaded, processor = load_model(model, device=device, dtype=dtype, attention=attention)
    return loaded, (to_model(encode(processor, [q.question], [[q.image]]), loaded) for q in questions)


def _validation(samples: int) -> list[Any]:
    """That many validation scenes with their questions, the families in equal parts."""
    from vtr.data.shapes import FAMILIES, PER_FAMILY, split_samples

    most = PER_FAMILY * len(FAMILIES)
    if not 1 <= samples <= most:
        raise ValueError(f"--samples: must be from 1 to {most}, got {samples}")
    return split_samples("validation", limit=-(-samples // len(FAMILIES)))[:samples]
