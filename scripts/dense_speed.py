#!/usr/bin/env python
"""Speed of `expedit` on dense ViTs with random weights, full and reduced in turn: `OMP_NUM_THREADS=1 python scripts/dense_speed.py vit-l-640`."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pages import dense_cost as dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["vit-l-640"], help=f"of {', '.join(dense.SHAPES)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    for name in given.shapes:
        if name not in dense.SHAPES:
            parser.error(f"unknown shape {name!r}; choose from {', '.join(dense.SHAPES)}")
        shape = dense.SHAPES[name]
        model, pixels = dense.build(shape, given.device, dtype, given.batch)
        costs = dense.measure(model, pixels, [("full", {}), ("expedit", shape.settings)], given.repeats)
        print(dense.markdown(name, costs, device, dtype), flush=True)


if __name__ == "__main__":
    main()
