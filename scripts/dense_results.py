#!/usr/bin/env python
"""Dense results on models/tiny-vit-seg, into docs/dense.md and docs/results.md, with two pictures: `python scripts/dense_results.py`."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pages import dense
from scripts.pages import dense_cost as bench
from scripts.pages.blocks import write_block
from vtr.data.scenes import draw
from vtr.data.segmentation import test_scenes
from vtr.eval.report.marked import has_block
from vtr.models.dense import load_dense

SHOWN = 2  # of the variants, in the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-vit-seg"))
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of dense.md and figures/; numbers go to dense.json there")
    given = parser.parse_args()
    model = load_dense(given.model)
    pictures = [draw(scene) for scene in test_scenes(10)]
    costs = bench.measure(model, model.prepare(pictures), dense.VARIANTS, given.repeats)
    table = dense.rows(dense.evaluate(model, dense.VARIANTS, given.scenes), costs, bench.label)
    where = f"torch {torch.__version__}, process time of {torch.get_num_threads()} thread(s), batch {len(pictures)}, float32"
    (given.out / "figures").mkdir(parents=True, exist_ok=True)
    dense.plot(table, given.out / "figures" / "dense.png")
    inputs, settings = model.prepare(pictures[:3]), dense.VARIANTS[SHOWN][1]
    labels = bench.cluster_labels(model.vit, inputs, settings["alpha"], settings["grid"]).numpy()
    dense.picture(model, pictures[:3], list(labels), dense.VARIANTS[SHOWN]).save(given.out / "figures" / "dense-clusters.png")
    dense.write_rows(given.out / "figures" / "dense.json", table, {"model": str(given.model), "scenes": given.scenes, "where": where})
    command = f"OMP_NUM_THREADS=1 python scripts/dense_results.py --scenes {given.scenes} --repeats {given.repeats}"
    text = f"Made by `{command}`; {given.scenes} test scenes of `shapes`; {where}.\n"
    results = given.out / "results.md"
    for page in (given.out / "dense.md", *([results] if results.is_file() and has_block(results.read_text(), "dense") else [])):
        write_block(page, "dense", f"{text}\n{dense.markdown(table)}")


if __name__ == "__main__":
    main()
