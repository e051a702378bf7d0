"""FastVID vectors (authors' code for LLaVA-OneVision): the LLM's input, attention and descriptors of frames -> segments, tokens kept and merged."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from scripts.replay._videos import frames_of_tokens
from vtr.methods.fastvid import authors_shares, context_scores, fastvid
from vtr.ops.frames import best_of_frames
from vtr.ops.segments import segments


def replay(vector: Vector) -> None:
    if not vector.has("hidden_states", "frame_attn", "frame_global", "out_hidden", "keep_indices"):
        raise vector.unknown_schema()
    hidden, start, length = vector["hidden_states"][0], int(vector.param("video_start")), int(vector.param("video_len"))
    frames = frames_of_tokens(hidden[start : start + length].unflatten(0, (int(vector.param("num_frames")), -1)))
    count = frames.real.sum(2)
    parts = segments(vector["frame_global"][None], count > 0, float(vector.param("DySeg_tau")), int(vector.param("DySeg_c")))
    same_index("segment_sizes", parts.number[0].bincount(), vector["segment_sizes"])
    context, every = float(vector.param("STPrune_d")), int(vector.param("DTM_p"))
    shares = authors_shares(count, parts, float(vector.param("retention_ratio")), context, every)
    same_index("anchors_per_frame", shares.context[0], vector["anchors_per_frame"])
    score = vector["frame_attn"][None]
    salient = best_of_frames(score, frames.real, shares.salient)
    same_index("salient_idx", salient[0].nonzero()[:, 1].view(len(vector["salient_idx"]), -1), vector["salient_idx"])
    density = context_scores(frames, frames.real & ~salient, int(vector.param("density_knn")))
    close("density_score", density[0][~salient[0]].view_as(vector["density_score"]), vector["density_score"])
    most = int(shares.context.sum())
    kept, tokens, _ = fastvid(frames, score, parts, shares, most, float(vector.param("DTM_beta")), int(vector.param("density_knn")))
    everything = torch.ones(len(hidden), dtype=torch.bool)
    everything[start : start + length] = kept.flatten()
    same_index("keep_indices", everything.nonzero()[:, 0], vector["keep_indices"])
    merged = hidden.clone()
    merged[start : start + length] = tokens[0].flatten(0, 1)
    close("out_hidden", merged[everything][None], vector["out_hidden"])
