"""TokenCorr vectors (our float64 reference of the card): density, both branches and the kept tokens of each crop."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.tokencorr import distribution, information_density, local_number, similar_counts, tokencorr
from vtr.ops.attention_rows import attention_rows
from vtr.ops.outliers import upper_fence


def replay(vector: Vector) -> None:
    if not vector.has("q_cls_low", "keys_low", "q_cls_deep", "keys_deep", "tokens_last"):
        raise vector.unknown_schema()
    heads, factor = int(vector.param("heads")), float(vector.param("iqr_factor", 1.5))
    tokens = vector["tokens_last"]
    real = torch.ones(tokens.shape[:2], dtype=torch.bool)
    similar = similar_counts(vector["keys_low"][:, 1:].double(), real, float(vector.param("alpha")))
    same_index("similar_count", similar, vector["similar_count"])
    rho = float(vector.param("rho"))
    same_index("redundant", similar > rho * (real.shape[1] - 1), vector["redundant"])
    density = information_density(similar, real, rho)
    close("density", density, vector["density"])

    low, deep = (distribution(_cls_row(vector[f"q_cls_{at}"], vector[f"keys_{at}"], heads), real) for at in ("low", "deep"))
    close("attn_low", low, vector["attn_low"])
    close("attn_deep", deep, vector["attn_deep"])
    close("upper_fence", upper_fence(deep, real, factor), vector["upper_fence"])
    same_index("n_local", local_number(density, real), vector["n_local"])
    near, far = tokencorr(density, low / vector["noise"].double(), deep, real, factor)
    kept = near | far
    same_index("local_mask", near, vector["local_mask"])
    same_index("global_mask", far, vector["global_mask"])
    same_index("kept_mask", kept, vector["kept_mask"])
    same_index("out_len", kept.sum(1), vector["out_len"])
    close("out_tokens", tokens[kept], vector["out_tokens"])


def _cls_row(query: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Returns the attention of CLS `(S, N)` from `query (S, D)` and `keys (S, 1 + N, D)` with CLS first; mean over heads."""
    split = keys.double().unflatten(2, (heads, -1)).transpose(1, 2)
    rows = attention_rows(query.double().unflatten(1, (heads, -1))[:, :, None], split, split.shape[-1] ** -0.5)
    return rows[:, :, 0, 1:].mean(1)
