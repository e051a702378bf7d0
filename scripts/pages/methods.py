"""What the page of a method shows of our own measurements: a picture of what it retains, and its rows beside `random` and `full`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vtr.eval.examples import Example, answer_examples
from vtr.eval.measured import Measured
from vtr.eval.report.marked import has_block, with_block
from vtr.eval.run.asking import encode, seen_of, to_model
from vtr.files import write_atomic
from vtr.markdown import markdown_table
from vtr.registry import create_method, list_methods, method_class
from vtr.testing.given import reduced
from vtr.types.settings import default_settings

KEEP, KEEP_OF_VIDEO = 64, 72
SIDE = 384
COLORS = 96  # of the palette: a picture of about 40 kB


def draw_pictures(model: Any, processor: Any, example: Example, folder: Path, names: Iterable[str] | None = None) -> list[Path]:
    """Draws one PNG per method that leaves fewer tokens: what it retains of an example image, at 64 visual tokens where it has a budget.

    Args:
        model, processor: from `load_model`.
        example: image and question.
        folder: where `NAME.png` is written.
        names: methods; None for all. One that cannot work on this model is left out.
    """
    written = []
    for name in list_methods() if names is None else names:
        if method_class(name).card.needs_video:
            continue
        settings = {"keep": KEEP} if method_class(name).takes_budget and "keep" in default_settings(method_class(name)) else {}
        try:
            (answered,) = answer_examples(model, processor, [example], [create_method(name, **settings)])
        except (ValueError, RuntimeError):
            continue
        picture = answered.pictures[1].resize((SIDE, SIDE), Image.Resampling.LANCZOS).quantize(COLORS)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png", optimize=True)
        written.append(folder / f"{name}.png")
    return written


def draw_videos(model: Any, processor: Any, sample: Any, folder: Path) -> list[Path]:
    """Draws one PNG per method for videos: what it retains of the frames of a sample, at 72 visual tokens of 288.

    Args:
        model, processor: from `load_model`.
        sample: of `shapes-video`.
        folder: where `NAME.png` is written.
    """
    written = []
    inputs = to_model(encode(processor, [sample.question], [[]], [seen_of(sample, whole=True)[1]]), model)
    for name in (name for name in list_methods() if method_class(name).card.needs_video):
        with torch.no_grad(), reduced(model, create_method(name, keep=KEEP_OF_VIDEO)) as reduction:
            model.generate(**inputs, max_new_tokens=1)
            picture = reduction.report().draw(list(sample.frames), processor=processor)
        picture = picture.resize((2 * SIDE, round(2 * SIDE * picture.height / picture.width)), Image.Resampling.LANCZOS)
        picture = picture.convert("RGB").quantize(COLORS, method=Image.Quantize.MAXCOVERAGE)  # keeps the colors of small things
        picture.save(folder / f"{name}.png", optimize=True)
        written.append(folder / f"{name}.png")
    return written


def measured_table(name: str, lines: Sequence[Measured]) -> str:
    """Returns a Markdown table of a method's rows over all models, macro accuracy in percent with 95 % intervals; empty where it never ran."""
    body = []
    for one in (own for own in lines if own.method == name):
        others = (one.random or "-", one.pool or "-", one.full or "-", one.tokens, one.average, one.families_no_better)
        body.append([one.on, one.setting or "-", one.score, *others])
    if not body:
        return ""
    head = ["measured on", "budget", "macro accuracy", "`random` there", "`pool`", "full", "tokens left", "average over the LLM"]
    return markdown_table([*head, "not better than `random` or `pool` on"], body)


def update_page(page: Path, lines: Sequence[Measured], picture: Path | None, question: str, asked: str = "") -> bool:
    """Writes the block between the marks of a page, `asked` being the question about a video; False where the page has no marks."""
    text = page.read_text(encoding="utf-8")
    if not has_block(text, "measured"):
        return False
    parts = []
    if picture is not None and picture.is_file():
        place = picture.relative_to(page.parents[1])
        video = page.stem in list_methods() and method_class(page.stem).card.needs_video
        what = f'tiny-llava-video, "{asked}", {KEEP_OF_VIDEO} of 288 tokens' if video else f'tiny-llava, "{question}"'
        merged = ", and merged tokens are tinted like their pivot, in whichever frame that is" if video else ""
        parts.append(f"![what {page.stem} retains](../{place.as_posix()})\n\n{what}: what is retained; the rest is dimmed{merged}.")
    if table := measured_table(page.stem, lines):
        parts.append(f"Every method beside it: [results](../results.md).\n\n{table}")
    block = "\n\n".join(parts) or "Not measured yet."
    write_atomic(page, with_block(text, "measured", block))
    return True
