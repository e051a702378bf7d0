"""Vectors `transprune-*` (authors' code): TTV of one layer; scores, selection and sequence of one stage."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from scripts.replay._llama import project, rope
from vtr.methods.transprune import transition_weight, transprune_score
from vtr.ops.gather import compaction, take
from vtr.ops.prompt_rows import causal_text, prompt_rows
from vtr.ops.topk import topk_mask
from vtr.types import PerToken


def replay(vector: Vector) -> None:
    if vector.has("attn_in", "ffn_out", "ttv"):
        _layer(vector)
    elif vector.has("hidden", "ttv_layers", "kept_abs"):
        _stage(vector)
    else:
        raise vector.unknown_schema()


def _layer(vector: Vector) -> None:
    real = torch.ones(vector["ttv"].shape, dtype=torch.bool)
    nothing = real[:, :0]
    found = []
    for block in ("attn", "ffn"):
        entered, left = (PerToken(x, x[:, :0]) for x in (vector[f"{block}_in"], vector[f"{block}_out"]))
        # the authors' softmax takes the whole batch in, as if it were one prompt
        found.append(transition_weight(entered, left, real, nothing, torch.zeros(len(real), dtype=torch.int64))[0])
        close(f"ttv_{block}", found[-1], vector[f"ttv_{block}"])
    close("ttv", sum(found), vector["ttv"])  # type: ignore[arg-type]


def _stage(vector: Vector) -> None:
    hidden, heads = vector["hidden"], vector.param("num_heads")
    start, n = vector.param("image_start"), vector.param("image_tokens_current")
    length = hidden.shape[1]
    place = torch.arange(length)
    visual = (place >= start) & (place < start + n)
    norm = (vector["ln_weight"], vector.param("rms_eps", 1e-5))
    query, key = (
        rope(project(hidden, *norm, vector[f"{which}_weight"], own), place[None], vector.param("rope_theta", 10000.0))
        for which, own in (("q", heads), ("k", vector.param("num_kv_heads", heads)))
    )
    real, text_real = torch.ones(1, n, dtype=torch.bool), torch.ones(1, length - n, dtype=torch.bool)
    behind = (place[~visual] >= start + n)[None]
    rows = prompt_rows(
        query[:, ~visual],
        key[:, visual],
        key[:, ~visual],
        real,
        text_real,
        torch.zeros(1, dtype=torch.int64),
        sees_text=causal_text(text_real),
        sees_visual=behind[:, :, None] & real[:, None],
    )
    close("iga_rows", rows[behind], vector["iga_rows"])
    score = transprune_score(vector["ttv_layers"].sum(0)[None, visual], rows, behind, real)
    close("iga", score.iga[0], vector["iga"])
    close("ttv_accum", score.ttv[0], vector["ttv_accum"])
    close("score", score.total[0], vector["score"])
    keep = vector.param("keep", len(vector["kept_abs"]))
    kept = torch.zeros(1, length, dtype=torch.bool)
    kept[:, visual] = topk_mask(score.total, real, torch.tensor([keep]))
    same_index("kept_abs", kept[0].nonzero().flatten(), vector["kept_abs"])
    index, _ = compaction(kept | ~visual)
    close("new_hidden", take(hidden, index), vector["new_hidden"])
    same_index("new_position_ids", torch.arange(index.shape[1])[None], vector["new_position_ids"])
    close("ttv_layers_after", vector["ttv_layers"][:, index[0]], vector["ttv_layers_after"])
