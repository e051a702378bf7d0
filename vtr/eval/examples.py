"""The scene images that come with the repository, and the demo that is run on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtr.data.pictures import open_image
from vtr.data.shapes import is_correct
from vtr.eval.run.asking import encode, to_model
from vtr.eval.run.compare import Outcome, ask, views_of
from vtr.hosts._protocol import host_of
from vtr.recipes import shared_folders
from vtr.types import Method, VtrError
from vtr.types.naming import FULL
from vtr.viz import Tile, contact_sheet, draw_patches


@dataclass(frozen=True)
class Example:
    """A shipped image with a question and its answer."""

    file: Path
    question: str
    answer: str


@dataclass
class Answered:
    """An example with the outcome of every column (the full model first) and the pictures of them."""

    example: Example
    outcomes: list[Outcome]
    pictures: list[Image.Image]

    def correct(self, column: int) -> bool:
        """Tells whether that column's answer is right."""
        return is_correct(self.outcomes[column].answer, self.example.answer)


def load_examples() -> list[Example]:
    """Returns the entries of `eval/examples/questions.json`.

    Raises:
        VtrError: not there.
    """
    for folder in shared_folders("eval/examples"):
        file = folder / "questions.json"
        if file.is_file():
            entries = json.loads(file.read_text(encoding="utf-8"))
            return [Example(folder / entry["image"], entry["question"], entry["answer"]) for entry in entries]
    raise VtrError("demo: eval/examples/questions.json is not here; run inside the repository, or install the package")


def answer_examples(
    model: Any, processor: Any, examples: Sequence[Example], methods: Sequence[Method], advance: Callable[[int], None] = lambda count: None
) -> list[Answered]:
    """Asks every example with the full model and with each method.

    Args:
        model, processor: from `load_model`.
        examples: what to ask.
        methods: one column each, after the full model's.
        advance: called with 1 after every answer.
    """
    found = []
    for example in examples:
        picture = open_image(example.file)
        inputs = to_model(encode(processor, [example.question], [[picture]]), model)
        outcomes, pictures = [], []
        for method in (None, *methods):
            outcome, report = ask(model, processor, inputs, method, max_new_tokens=16)
            outcomes.append(outcome)
            resized = method is not None and "input" in method.stages
            views, image = views_of(host_of(model), processor, inputs, [picture])[0], report["images"][0] if report else None
            pictures.append(draw_patches(views, image, resized=resized))
            advance(1)
        found.append(Answered(example, outcomes, pictures))
    return found


def demo_sheet(answered: Sequence[Answered], keep: int, name: str) -> Image.Image:
    """Returns the contact sheet of the demo: a row per example, a column per method."""
    names = [outcome.name for outcome in answered[0].outcomes]
    counts = [sum(outcome.retained) for outcome in answered[0].outcomes]
    columns = [f"{method}: {count} visual tokens" for method, count in zip(names, counts, strict=True)]
    rows = [
        (
            f"{one.example.question}  ({one.example.answer})",
            [
                Tile(picture, outcome.answer, one.correct(column))
                for column, (picture, outcome) in enumerate(zip(one.pictures, one.outcomes, strict=True))
            ],
        )
        for one in answered
    ]
    return contact_sheet(f"{name}: {FULL} model and {keep} visual tokens, removed patches dimmed", columns, rows)
