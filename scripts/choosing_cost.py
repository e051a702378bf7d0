#!/usr/bin/env python3
"""Prints what choosing tokens costs on `llava-mid` (random weights): one table for 576 and one for 2880 visual tokens."""

import argparse
import datetime
import platform

import torch
import transformers

import vtr
from vtr.bench.choosing import markdown, measure
from vtr.bench.shapes import SHAPES, build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--shape", default="llava-mid", choices=SHAPES)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--only", nargs="*", help="names of methods; default all with a budget")
asked = parser.parse_args()

torch.set_num_threads(asked.threads)
device = torch.cuda.get_device_name() if asked.device.startswith("cuda") else f"{platform.machine()} CPU, {asked.threads} thread(s)"
print(
    f"{device}, {asked.dtype}, batch 1, SDPA, torch {torch.__version__}, transformers {transformers.__version__}, {datetime.date.today()}\n"
)
names = asked.only or [n for n in vtr.list_methods() if vtr.registry.method_class(n).default_budget]
for anyres, share in ((False, 1 / 9), (True, 1 / 18)):
    model, inputs = build(SHAPES[asked.shape], anyres, getattr(torch, asked.dtype), asked.device)
    with vtr.reduced(model, "uniform", keep_ratio=1.0) as reduction, torch.no_grad():
        model(**inputs, logits_to_keep=1)
        tokens = reduction.report().images[0].visual_tokens
    keep = round(share * tokens)
    print(markdown(asked.shape, tokens, *measure(model, inputs, [(n, {"keep": keep}) for n in names], asked.repeats)), flush=True)
    print()
