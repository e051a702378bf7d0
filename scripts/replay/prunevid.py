"""PruneVid vectors (authors' code, no noise): features of a video -> clusters of frames, merged tokens; attention of text -> what stays."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from scripts.replay._videos import frames_of_tokens
from vtr.methods._prunevid import frame_clusters, refined
from vtr.methods.prunevid import attended_blocks, prunevid_authors, question_score
from vtr.ops.frames import frame_means


def replay(vector: Vector) -> None:
    if not vector.has("features", "frame_cluster_refined", "out", "static_sizes", "dynamic_sizes", "window_sizes", "llm_attn", "llm_keep"):
        raise vector.unknown_schema()
    count, ratio = int(vector.param("num_frames")), float(vector.param("temporal_segment_ratio"))
    frames = frames_of_tokens(vector["features"][0].unflatten(0, (count, -1)))
    label, _ = frame_clusters(frame_means(frames), frames.there, ratio)
    same_index("frame_cluster", label, vector["frame_cluster"])
    same_index("frame_cluster_refined", refined(label, frames.there.sum(1)), vector["frame_cluster_refined"])

    made = prunevid_authors(frames, float(vector.param("tau")), ratio, float(vector.param("cluster_ratio")))
    same_index("static_sizes", made.static, vector["static_sizes"])
    same_index("dynamic_sizes", made.moving, vector["dynamic_sizes"])
    same_index("window_sizes", made.window, vector["window_sizes"])
    close("out", made.values[None], vector["out"])

    rows = vector["llm_attn"]
    score = question_score(rows, torch.ones(rows.shape[0], rows.shape[2], dtype=torch.bool))
    kept = attended_blocks(score, made.block[None], torch.ones_like(score, dtype=torch.bool), None, 2 * count, float(vector.param("alpha")))
    same_index("llm_keep", kept[0].nonzero()[:, 0], vector["llm_keep"])
