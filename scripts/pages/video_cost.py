"""What methods for videos pay for choosing at the boundary: CPU time and memory on one thread, each in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch

from vtr.markdown import markdown_table
from vtr.registry import create_method, list_methods, method_class
from vtr.types import Geometry, Signal, View

SHAPES = ((16, 196), (64, 196))
WIDTH, SIDE = 3584, 14
LLAVA_ONEVISION = Geometry(
    "llava_onevision", 26, 25, 0, False, (27, 27), 28, None, kinds=("image", "video"), layer_kinds=("full_attention",) * 28
)


def video_view(frames: int, places: int, keep: int, needs: tuple[Signal, ...]) -> View:
    """Returns a View of one video of random tokens, each frame somewhat like the one before it."""
    random = torch.Generator().manual_seed(0)
    still, moving = torch.randn(places, WIDTH, generator=random), torch.randn(frames, places, WIDTH, generator=random)
    tokens, count = (still + 0.5 * moving).bfloat16().view(1, -1, WIDTH), frames * places
    cells = torch.cartesian_prod(torch.arange(frames), torch.arange(SIDE), torch.arange(SIDE))[None]
    scores = {need: torch.rand(1, frames if need.kind == "frame_score" else count, generator=random) for need in needs}
    numbers = torch.arange(count)[None]
    return View(
        tokens=tokens, real=torch.ones(1, count, dtype=torch.bool), keep=torch.tensor([keep]), counts=[count], keeps=[keep], most=keep,
        row=torch.zeros(1, dtype=torch.int64), cells=cells, patch=numbers, grids=[[(SIDE, SIDE)] * frames], crop_grids=[(0, 0)],
        image_sizes=[(0, 0)], sizes=torch.ones(1, count), checksum=torch.zeros(1, dtype=torch.int64), signals=scores, kinds=["video"],
        frames=[frames],
    )  # fmt: skip


def measure(name: str, frames: int, places: int) -> dict[str, float]:
    """Returns milliseconds of CPU time, the least of three, and MiB above what the tokens themselves need, in this process."""
    torch.set_num_threads(1)
    method = create_method(name, keep_ratio=0.25).resolved(video=True)
    step = next(step for step in method.steps(LLAVA_ONEVISION) if step.stage == "boundary")
    view = video_view(frames, places, frames * places // 4, step.needs)
    before, took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        started = time.process_time()
        assert step.select is not None
        step.select(view)
        took.append(1e3 * (time.process_time() - started))
    return {"ms": min(took), "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def table() -> str:
    """Returns the costs of every method for videos as markdown."""
    body = []
    for name in (name for name in list_methods() if method_class(name).card.needs_video):
        found = []
        for frames, places in SHAPES:
            command = f"import json; from scripts.pages.video_cost import measure; print(json.dumps(measure({name!r}, {frames}, {places})))"
            found.append(json.loads(subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout))
        body.append([f"`{name}`", *(f"{one['ms']:.0f}" for one in found), *(f"{max(one['mib'], 0):.0f}" for one in found)])
    heads = [f"{what} at {frames} x {places}" for what in ("ms", "peak MiB") for frames, places in SHAPES]
    return markdown_table(["method", *heads], body)
