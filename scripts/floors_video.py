#!/usr/bin/env python
"""Does tiny-llava-video reach its floors on shapes-video, and the tables for its model card: `python scripts/floors_video.py`."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pages.floors import update_card
from scripts.tiny.video_check import check_floors, measure, section
from vtr.cli._common import out, reported
from vtr.data.shapes_video import FRAMES, PER_FAMILY, test_samples


@reported
def floors(
    model: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")] = Path("models/tiny-llava-video"),
    card: Annotated[Path | None, typer.Option(help="Model card to write the tables into.")] = None,
    limit: Annotated[int, typer.Option(help="Only the first so many samples of each family.")] = PER_FAMILY,
    longer: Annotated[int, typer.Option(help="The same for clips of 16 frames.")] = PER_FAMILY,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 20,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Measure all, some and shuffled visual tokens, compare with the floors; exit code 1 when one is missed."""
    if threads:
        torch.set_num_threads(threads)
    llava = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(model, local_files_only=True)
    limits = dict(zip(FRAMES, (limit, longer), strict=True))
    scores = {n: measure(llava, processor, test_samples(limit=most, frames=n), n, batch_size) for n, most in limits.items()}
    found = check_floors(scores[FRAMES[0]])
    text = section(scores, found, f"test splits, the first {limit} questions of each family with 8 frames and {longer} with 16")
    out.print(text, soft_wrap=True, markup=False)
    if card:
        update_card(card, text)
    if not all(floor.passed for floor in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(floors)
