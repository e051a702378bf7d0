"""Draws docs/figures/hero.png, the picture on top of the README: one scene, the full model and seven methods, what they keep and answer."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from vtr.eval.examples import Answered, answer_examples, load_examples
from vtr.models.loading import load_model
from vtr.registry import create_method, method_class

MODEL, KEEP = "tiny-llava", 64
METHODS = ("fastv", "sparsevlm", "visionzip", "divprune", "cdpruner", "holov", "random")
FILE = Path(__file__).parents[1] / "docs" / "figures" / "hero.png"


def draw(answered: Answered) -> plt.Figure:
    """A tile for each way to answer, with the retained patches; green where the answer is right."""
    figure, tiles = plt.subplots(2, 4, figsize=(11, 6.9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(f"“{answered.example.question}”", fontsize=16, fontweight="bold")
    titles = ["full model", *(method_class(name).__name__ for name in METHODS)]
    for column, (tile, title, outcome, picture) in enumerate(zip(tiles.flat, titles, answered.outcomes, answered.pictures, strict=True)):
        tile.imshow(picture)
        tile.set(xticks=[], yticks=[])
        tile.set_title(f"{title}, {sum(outcome.retained)} tokens", fontsize=11)
        color = "#1a7f37" if answered.correct(column) else "#b42318"
        tile.set_xlabel(outcome.answer, fontsize=13, color=color, fontweight="bold")
    return figure


def main(image: str = "text-0.png") -> None:
    example = next(one for one in load_examples() if one.file.name == image)
    model, processor = load_model(MODEL)
    (answered,) = answer_examples(model, processor, [example], [create_method(name, keep=KEEP) for name in METHODS])
    draw(answered).savefig(FILE, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main(*sys.argv[1:])
