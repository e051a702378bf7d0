"""FlashVID vectors (authors' code, in front of the LLM): features and attention -> segments, diverse tokens, tokens merged."""

from __future__ import annotations

import math

import torch

from scripts.replay import Vector, close, same_index
from scripts.replay._videos import authors_peaks, frames_of_tokens
from vtr.methods.flashvid import by_segment, cluster_means, diverse, tree_means
from vtr.ops.frames import frame_means
from vtr.ops.gather import index_to_mask
from vtr.ops.segments import segments
from vtr.ops.trees import trees


def replay(vector: Vector) -> None:
    if not vector.has("features", "cls_attention", "segment_lengths", "adts_indices", "out", "out_indices"):
        raise vector.unknown_schema()
    frames = frames_of_tokens(vector["features"])
    count, places = vector["features"].shape[:2]
    parts = segments(
        frame_means(frames), frames.real.any(2), float(vector.param("segment_threshold")), int(vector.param("min_segment_num"))
    )
    same_index("segment_lengths", parts.number[0].bincount(), vector["segment_lengths"])
    budget = math.ceil(places * float(vector.param("retention_ratio")) * float(vector.param("expansion")))
    first = math.ceil(budget * float(vector.param("alpha")))
    relevance = vector.param("token_selection_method") == "attn_div_v2"
    number = torch.full((1, count), first)
    picks = diverse(frames, vector["cls_attention"][None], parts if relevance else None, number, first, repeat=True)[0].sort(1).values
    same_index("adts_indices", picks, vector["adts_indices"])

    chosen = index_to_mask(picks, None, places)[None]
    alone = parts.length == 1
    joining = frames.real & (~chosen | alone[..., None])  # the code forgets what is chosen where a segment is one frame
    size = by_segment(frames.real.sum(2), parts)
    limit = size - by_segment(torch.full_like(number, budget), parts)
    found = trees(frames, joining, parts, limit, float(vector.param("temporal_threshold")))
    roots = joining & ~found.linked.view(joining.shape)
    ratio = (budget - first) * parts.length.double() / by_segment(roots.sum(2), parts).gather(1, parts.number).clamp_min(1)
    clusters = (roots.sum(2) * ratio.clamp_max(1)).ceil().long()
    tokens, _ = tree_means(frames, found, joining, authors=True)
    into = torch.full_like(chosen, -1, dtype=torch.int64)[0]  # (T, P): the centre of every root
    for frame, number in enumerate(clusters[0].tolist()):
        place = roots[0, frame].nonzero()[:, 0]
        if number:
            into[frame, place] = place[authors_peaks(tokens[0].view(count, places, -1)[frame, place], number)]
    made = cluster_means(tokens, into[None])

    flat = frames.tokens.flatten(1, 2)[0]
    kept = (picks + torch.arange(count)[:, None] * places).flatten()
    centres = made.centre.flatten().nonzero()[:, 0]
    index, order = torch.cat([centres, kept]).sort(stable=True)
    same_index("out_indices", index, vector["out_indices"])
    out, want = torch.cat([made.tokens[0, centres], flat[kept]])[order], vector["out"]
    for i in (index[1:] == index[:-1]).nonzero()[:, 0].tolist():  # twice there: which comes first is left to the code's sort
        if (out[i] - want[i]).abs().max() > (out[i + 1] - want[i]).abs().max():
            out[[i, i + 1]] = out[[i + 1, i]]
    close("out", out, want)
