#!/usr/bin/env python
"""Fills "Measured here" of docs/methods: `python scripts/method_pages.py out/sweeps/main-table`; pictures go to docs/figures/methods.

What the folders hold goes into eval/measured/embedded.csv first, in place of older rows of the same; pages and `vtr info` read that file.
"""

import argparse
import sys
from pathlib import Path

from vtr.eval.examples import load_examples

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pages.methods import draw_pictures, draw_videos, update_page
from vtr.data.shapes_video import test_samples
from vtr.eval.measured import FILE, as_csv, measured_in, merged, read_measured
from vtr.eval.report import read_folders
from vtr.eval.report.build import sections_of
from vtr.files import write_atomic
from vtr.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="folders of vtr eval or vtr sweep")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--example", default="counting-3.png", help="image of eval/examples")
    parser.add_argument("--no-pictures", action="store_true")
    given = parser.parse_args()
    example = next(one for one in load_examples() if one.file.name == given.example)
    clip = next(one for one in test_samples(limit=3) if one.family == "motion")
    pictures = given.docs / "figures" / "methods"
    if not given.no_pictures:
        model, processor = load_model("tiny-llava", device="cpu")
        draw_pictures(model, processor, example, pictures)
        draw_videos(*load_model("tiny-llava-video", device="cpu"), clip, pictures)
    stored = Path("eval/measured", FILE)
    new = [one for section in sections_of(read_folders(given.results)[0]) for one in measured_in(section)]
    lines = merged(read_measured(stored) if stored.is_file() else [], new)
    write_atomic(stored, as_csv(lines))
    for page in sorted((given.docs / "methods").glob("*.md")):
        if not update_page(page, lines, pictures / f"{page.stem}.png", example.question, clip.question):
            print(f"{page}: no marks, left as it is")


if __name__ == "__main__":
    main()
