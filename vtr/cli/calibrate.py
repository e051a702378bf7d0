"""`vtr calibrate`: what a method learns from a few samples, written to a file that its settings take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.cli._common import Attention, Device, Dtype, Model, Quiet, is_given, out, progress, reported
from vtr.types.errors import WrongValue

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
    from vtr.eval.run.asking import encode, to_model
    from vtr.files import write_atomic
    from vtr.models.loading import load_model

    questions = _validation(samples)
    if not 0 < share <= 1:
        raise WrongValue(f"--share: must be in (0, 1], got {share}; the paper freezes 0.6 of the layers")
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
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", "-m", help="As elsewhere, or an encoder: timm:NAME, open_clip:ARCHITECTURE/WEIGHTS, folder or hub id.")
    ],
    target: Annotated[Path, typer.Option("--out", help="YAML file to write, or a recipe to add it to, which `tau=auto` finds.")],
    samples: Annotated[int, typer.Option(help="Images; each candidate runs on all of them.")] = 8,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures. Default: scenes of shapes.")] = None,
    alpha: Annotated[
        str | None, typer.Option(help="Blocks at full resolution; several, with commas between, are compared. Default: 10 of 24.")
    ] = None,
    grid: Annotated[
        str, typer.Option(help="Clusters as ROWSxCOLS, or their share of each side of the token grid; several, with commas, are compared.")
    ] = "0.7",
    most_tokens: Annotated[
        float, typer.Option(help="Keep only candidates with at most this share of the tokens, averaged over the blocks.")
    ] = 1.0,
    window: Annotated[int, typer.Option(help="Odd, in cells of the smaller grid.")] = 5,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
) -> None:
    """Find the tau, and on request the depth and grid, that change an encoder's output least (arXiv 2210.01035)."""
    from vtr.calibrate.expedit import TIMES, search
    from vtr.files import write_atomic
    from vtr.models.encoders import is_encoder
    from vtr.models.recipes import with_settings

    if is_given(context, "attention") and is_encoder(model):
        raise WrongValue(f"--attention: an encoder has one way to attend, got --attention {attention} for {model!r}; leave it out")
    pictures = [q.image for q in _validation(samples)] if images is None else _pictures(images, samples)
    alphas, grids = [None] if alpha is None else [_depth(word) for word in alpha.split(",")], [_clusters(word) for word in grid.split(",")]
    if not 0 < most_tokens <= 1:
        raise WrongValue(f"--most-tokens: must be in (0, 1], got {most_tokens}; 0.7 leaves 7 of 10 tokens, averaged over the blocks")
    before = target.read_text(encoding="utf-8") if target.is_file() else ""
    with_settings(before, "expedit", {})  # refuses a file that is no recipe before anything is loaded
    loaded, batches = _inputs(model, pictures, device, dtype, attention)
    with progress(quiet) as bars:
        task = bars.add_task("calibrating", total=len(pictures) * (1 + len(alphas) * len(grids) * (1 + len(TIMES))))
        found = search(loaded, batches, alphas, grids, window, most_tokens, lambda count: bars.advance(task, count))
    text = with_settings(before, "expedit", found.settings())
    if not before:
        data = "shapes v1, validation scenes" if images is None else f"pictures of {images.name}"
        text += f"samples: {len(pictures)}\ndata: {data}\nmodel: {model}\nerror: {found.best.error:.4g}\n"
    write_atomic(target, text)
    _show(found)
    best = found.best
    size = "x".join(map(str, best.grid)) if isinstance(best.grid, tuple) else f"{best.grid:g}"
    asked = (
        ""
        if alpha is None and grid == "0.7"
        else f" --set alpha={best.alpha} --set grid={list(best.grid) if isinstance(best.grid, tuple) else size}"
    )
    out.print(
        f"tau {best.tau:.4g}, written to {target}: use it as `--method expedit{asked} --set tau={target}`", soft_wrap=True, markup=False
    )


def _show(found: Any) -> None:
    """Prints the candidates as a table, the best marked."""
    from rich.table import Table

    table = Table("alpha", "grid", "tau", "error", "tokens", "ms", "", box=None, header_style="bold", pad_edge=False)
    for one in found.candidates:
        size = "x".join(map(str, one.grid)) if isinstance(one.grid, tuple) else f"{one.grid:g}"
        tau = "of each image" if one.tau is None else f"{one.tau:.4g}"
        mark = "best" if one is found.best else ""
        table.add_row(str(one.alpha), size, tau, f"{one.error:.4f}", f"{one.tokens:.2f}", f"{one.ms:.0f}", mark)
    out.print(
        "error: squared difference of the encoder's output tokens from the full encoder's, as a share of their variance", soft_wrap=True
    )
    out.print(
        f"tokens: share of the full encoder's, averaged over its blocks; ms: for one picture, full {found.full_ms:.0f}", soft_wrap=True
    )
    out.print(table)


def _depth(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise WrongValue(f"--alpha: must be a number of blocks, or several with commas between, got {word!r}; 5 or 4,5,6") from None


def _clusters(word: str) -> tuple[int, int] | float:
    sides = word.lower().split("x")
    try:
        return float(word) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
    except ValueError:
        raise WrongValue(f"--grid: must be ROWSxCOLS or a share in (0, 1], got {word!r}; 28x28 or 0.7") from None


def _inputs(model: str, pictures: list[Any], device: str | None, dtype: str, attention: str) -> tuple[Any, Any]:
    """Returns the model, an encoder or one with an LLM, and one input per picture."""
    from vtr.models.encoders import is_encoder, load_encoder

    if is_encoder(model):
        encoder, prepare = load_encoder(model, device, dtype)
        return encoder, (prepare(picture) for picture in pictures)
    from vtr.eval.run.asking import encode, to_model
    from vtr.models.loading import load_model

    loaded, processor = load_model(model, device=device, dtype=dtype, attention=attention)
    return loaded, (to_model(encode(processor, ["What is this?"], [[picture]]), loaded) for picture in pictures)


def _pictures(folder: Path, samples: int) -> list[Any]:
    """Returns the first pictures of a folder by name."""
    from PIL import Image

    from vtr.data.pictures import open_image

    if samples < 1:
        raise WrongValue(f"--samples: must be at least 1, got {samples}")
    known = Image.registered_extensions()
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in known)[:samples]
    if not files:
        raise WrongValue(f"--images: needs a folder with pictures, got {str(folder)!r}; .png and .jpg among others are known")
    return [open_image(file) for file in files]


def _validation(samples: int) -> list[Any]:
    """Returns that many validation scenes with their questions, the families in equal parts."""
    from vtr.data.shapes import FAMILIES, PER_FAMILY, split_samples

    most = PER_FAMILY * len(FAMILIES)
    if not 1 <= samples <= most:
        raise WrongValue(f"--samples: must be from 1 to {most}, got {samples}")
    return split_samples("validation", limit=-(-samples // len(FAMILIES)))[:samples]
