"""EVS vectors (vLLM's code): embeddings of a video on its merged grid -> how many tokens stay, and which."""

from __future__ import annotations

import torch

from scripts.replay import Vector, same_index, same_value
from vtr.methods.evs import evs, evs_count


def replay(vector: Vector) -> None:
    if not vector.has("video_embeds", "mask"):
        raise vector.unknown_schema()
    merge = int(vector.param("spatial_merge_size"))
    frames, places = int(vector.param("T")), int(vector.param("H")) // merge * (int(vector.param("W")) // merge)
    count = evs_count(frames, places, float(vector.param("q")))
    same_value("retained", count, int(vector["mask"].sum()))
    tokens = vector["video_embeds"].view(1, frames, places, -1)
    kept = evs(tokens, torch.ones(1, frames, places, dtype=torch.bool), torch.tensor([count]))
    same_index("mask", kept.flatten(), vector["mask"])
