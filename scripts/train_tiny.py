#!/usr/bin/env python
"""Train the embedded checkpoints: `python scripts/train_tiny.py` writes models/tiny-llava and models/tiny-llava-next; `--model tiny-vit-seg`,
`--model tiny-qwen-vl` and `--model tiny-llava-video` start from models/tiny-llava.

On CUDA when there is one (minutes), otherwise on the CPU (about two hours on two cores). Continues where it was stopped.
"""

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.tiny import qwen_run, run, segmentation, video_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny-llava", "tiny-vit-seg", "tiny-qwen-vl", "tiny-llava-video"), default="tiny-llava")
    parser.add_argument("--out", type=Path, default=Path("models/tiny-llava"), help="folder of tiny-llava; others lie beside it")
    parser.add_argument("--state", type=Path, default=Path("out/train-tiny"), help="training states and the log")
    parser.add_argument("--stage", help="only this stage, e.g. tower, llava96, llava192, whole, next; qwen-tower, qwen96, qwen-whole")
    parser.add_argument("--until", type=datetime.fromisoformat, help="when the last stage ends, e.g. 2026-11-28T14:20")
    parser.add_argument("--export", action="store_true", help="tiny-llava-video: only export the last saved state")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    run.start_log(given.state)
    until = given.until.timestamp() if given.until else None
    if given.model == "tiny-vit-seg":
        segmentation.train(given.out.with_name(given.model), given.state, given.out, given.device, given.seed)
    elif given.model == "tiny-llava-video":
        video_run.train(given.out.with_name(given.model), given.state, given.out, given.device, given.seed, until, given.export)
    elif given.model == "tiny-qwen-vl":
        qwen_run.train(given.out.with_name(given.model), given.state, given.out, given.stage, given.device, given.seed, until)
    else:
        run.train(given.out, given.state, given.stage, given.device, given.seed)


if __name__ == "__main__":
    main()
