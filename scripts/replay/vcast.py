"""V-CAST vectors (authors' code): features -> curvature and weight of every frame, its budget, and the tokens kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scripts.replay import Vector, close, same_index
from scripts.replay._videos import frames_of_tokens
from vtr.methods.vcast import EPS, curvature, frame_budgets, vcast
from vtr.ops.frames import frame_means


def replay(vector: Vector) -> None:
    if not vector.has("features", "curvature", "weights", "budget_per_frame", "keep_indices"):
        raise vector.unknown_schema()
    frames = frames_of_tokens(vector["features"])
    temperature, least = float(vector.param("temperature")), int(vector.param("min_k"))
    count = frames.real.sum(2)
    total = int(count.sum())
    keep = torch.tensor([max(min(max(round(total * float(vector.param("retain_ratio"))), 1), total), min(count.shape[1] * least, total))])
    turn = curvature(F.normalize(frame_means(frames), dim=-1, eps=EPS), count > 0)
    close("curvature", turn[0], vector["curvature"])
    close("weights", (turn / temperature).softmax(1)[0], vector["weights"])
    same_index("budget_per_frame", frame_budgets(turn, count, keep, temperature, least, loop=True)[0], vector["budget_per_frame"])
    kept = vcast(frames, keep, temperature, least, loop=True)
    same_index("keep_indices", kept.flatten().nonzero()[:, 0], vector["keep_indices"])
