"""VScan vectors (authors' code): scores and features -> local, global and merged tokens; hidden states of an LLM layer -> survivors."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from scripts.replay._llama import project, rms_norm, rope
from vtr.methods.vscan import capped, windows_of
from vtr.ops.gather import take
from vtr.ops.joining import join_nearest
from vtr.ops.parts import topk_per_part
from vtr.ops.prompt_rows import last_token_row
from vtr.ops.topk import topk_mask


def replay(vector: Vector) -> None:
    if vector.has("hidden", "q_weight", "k_weight", "kept_abs"):
        _llm(vector)
    elif vector.has("cls_attn_shallow", "cls_attn_deep", "features"):
        _clip(vector)
    elif vector.has("attn_local", "attn_global", "features"):
        _qwen(vector)
    else:
        raise vector.unknown_schema()


def _clip(vector: Vector) -> None:
    shallow, deep, features = vector["cls_attn_shallow"].mean(1), vector["cls_attn_deep"].mean(1), vector["features"]
    rows, n = shallow.shape
    real = torch.ones(rows, n, dtype=torch.bool)
    budget = int(vector.param("visual_token_num"))
    wanted = int(budget * float(vector.param("local_ratio", 0.5)))
    window, windows = windows_of(_cells(vector.param("grid"), rows), 1, tuple(vector.param("grid")), int(vector.param("window", 6)))
    local = topk_per_part(shallow, window, real, torch.full((rows, windows), wanted // windows))
    same_index("local_indices", _ascending(local), vector["local_indices"].sort(1).values)
    others = topk_mask(deep.masked_fill(local, 0), real, torch.full((rows,), budget - wanted))  # a zero may be chosen once more
    same_index("global_indices", _ascending(others), vector["global_indices"].sort(1).values)
    kept = local | others
    same_index("index_mask", kept, vector["index_mask"])
    close("merged", join_nearest(features, None, kept, ~kept, kept, int(kept.sum(1).max())).values, vector["merged"])


def _qwen(vector: Vector) -> None:
    score, deep, features = vector["attn_local"][None], vector["attn_global"][None], vector["features"][None]
    (height, width), keep, side = vector.param("grid"), int(vector.param("keep")), int(vector.param("window", 4))
    down, across = height // side, width // side
    _, row, col = _cells((height, width), 1).unbind(-1)
    window = (row // side).clamp_max(down - 1) * across + (col // side).clamp_max(across - 1)  # the last takes what is over
    real, wanted = torch.ones(1, height * width, dtype=torch.bool), torch.tensor([keep // 2])
    local = capped(score, window, real, wanted, down * across)
    order = score.masked_fill(~local, -torch.inf).argsort(dim=1, descending=True, stable=True)[0, : int(local.sum())]
    same_index("local_indices", order, vector["local_indices"])
    others = topk_mask(deep.masked_fill(local, 0), real, keep - wanted)
    same_index("global_indices", _ascending(others)[0], vector["global_indices"].sort().values)
    kept = local | others
    same_index("keep_index", _ascending(kept)[0], vector["keep_index"])
    close("merged", join_nearest(features, None, kept, ~kept, kept, keep).values[0], vector["merged"])


def _llm(vector: Vector) -> None:
    hidden, heads = vector["hidden"], int(vector.param("num_heads"))
    start, number, eps = int(vector.param("image_start")), int(vector.param("image_tokens")), float(vector.param("rms_eps"))
    if vector.has("q_bias"):  # the file for Qwen2.5-VL ranks without the rotary embedding
        normed, groups = rms_norm(hidden, vector["ln_weight"], eps), int(vector.param("num_kv_heads"))
        query = (normed @ vector["q_weight"].T + vector["q_bias"]).unflatten(-1, (heads, -1))
        key = (normed @ vector["k_weight"].T + vector["k_bias"]).unflatten(-1, (groups, -1))
        positions = vector["position_ids"]
    else:
        positions = torch.arange(hidden.shape[1])[None]
        base = float(vector.param("rope_theta", 10000.0))
        query, key = (
            rope(project(hidden, vector["ln_weight"], eps, vector[name], own), positions, base)
            for name, own in (("q_weight", heads), ("k_weight", int(vector.param("num_kv_heads", heads))))
        )
    visual = torch.zeros(hidden.shape[1], dtype=torch.bool)
    visual[start : start + number] = True
    real, text_real = (torch.ones(1, int(which.sum()), dtype=torch.bool) for which in (visual, ~visual))
    row = torch.zeros(1, dtype=torch.int64)
    score = last_token_row(query[:, visual], query[:, ~visual], key[:, visual], key[:, ~visual], real, text_real, row)
    survives = ~visual
    survives[visual] = topk_mask(score, real, torch.tensor([int(vector.param("keep"))]))[0]
    kept = survives.nonzero()[:, 0]
    same_index("kept_abs", kept, vector["kept_abs"].flatten())
    close("new_hidden", take(hidden, kept[None]), vector["new_hidden"])
    after = positions[..., kept] if vector.has("q_bias") else torch.arange(len(kept))[None]
    same_index("new_position_ids", after, vector["new_position_ids"])


def _cells(grid: tuple[int, int], rows: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(1), torch.arange(grid[0]), torch.arange(grid[1])).expand(rows, -1, -1)


def _ascending(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 1].view(len(mask), -1)
