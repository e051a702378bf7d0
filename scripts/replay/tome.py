"""ToMe vectors: one matching and merge (`metric`, `x`, ...), and a small ViT with proportional attention (`blocks0_...`).

The authors' output order is unmerged even tokens, then all odd ones; ours is position order, so rows are permuted before comparing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.replay import Vector, close, same_index
from vtr.methods.tome import tome
from vtr.ops.bipartite import Match, bipartite_match, merge_tokens, size_bias, unmerge_tokens


def replay(vector: Vector) -> None:
    if vector.has("metric", "x", "merged", "src_idx"):
        _merge(vector)
    elif vector.has("blocks0_attn_qkv_weight", "x", "out"):
        _vit(vector)
    else:
        raise vector.unknown_schema()


def _merge(vector: Vector) -> None:
    metric, x = vector["metric"], vector["x"]
    batch, length = metric.shape[:2]
    cls, distill = bool(vector.param("class_token", False)), bool(vector.param("distill_token", False))
    at = torch.arange(length).expand(batch, -1)
    source, destination = at % 2 == 0, at % 2 == 1
    if cls:
        source = source & (at != 0)
    if distill:
        destination = destination & (at != 1)
    remove = max(min(vector.param("r"), (length - cls - distill) // 2), 0)
    size = vector["size_in"].view(batch, length) if vector.has("size_in") else torch.ones(batch, length)

    match = bipartite_match(metric, source, destination, torch.full((batch,), remove))
    merged, merged_size = merge_tokens(x, size, match.assign)
    order = _authors_order(match, remove, cls, distill)
    by_similarity = match.similarity.masked_fill(match.keep, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :remove]
    if remove:
        same_index("src_idx", by_similarity // 2, vector["src_idx"].view(batch, -1))
        same_index("dst_idx", match.assign.gather(1, by_similarity) // 2, vector["dst_idx"].view(batch, -1))
        same_index("unm_idx", order[order % 2 == 0].view(batch, -1) // 2, vector["unm_idx"].view(batch, -1))
    row = torch.zeros(batch, length, dtype=torch.int64).scatter_(1, order, at[:, : length - remove])
    same_index("group_of_token", row.gather(1, match.assign), vector["group_of_token"])
    close("merged", _rows(merged, order), vector["merged"])
    close("size_out", merged_size.gather(1, order), vector["size_out"].view(batch, -1))
    close("unmerged", unmerge_tokens(merged, match.assign), vector["unmerged"])


def _authors_order(match: Match, remove: int, cls: bool, distill: bool) -> Tensor:
    """Input tokens `(B, T')` in the order of the authors' output; without a CLS token unmerged ones come by falling similarity."""
    batch, length = match.keep.shape
    at = torch.arange(length).expand(batch, -1)
    if not remove:
        return at
    by_similarity = match.similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    place = torch.where(match.keep & (at % 2 == 0), at if cls else by_similarity, length)
    unmerged, odd = place.argsort(dim=1, stable=True)[:, : (length + 1) // 2 - remove], at[:, 1::2]
    if distill:
        return torch.cat([unmerged[:, :1], odd[:, :1], unmerged[:, 1:], odd[:, 1:]], 1)
    return torch.cat([unmerged, odd], 1)


def _vit(vector: Vector) -> None:
    """Patches stay in position order and carry their `number`, as on a host."""
    x, heads, eps = vector["x"], vector.param("heads"), vector.param("norm_eps", 1e-6)
    cls = bool(vector.param("class_token", True))
    schedule = vector.param("r_schedule")
    prefix, patches = x[:, : int(cls)], x[:, int(cls) :]
    size = torch.ones(patches.shape[:2])
    number = torch.arange(patches.shape[1]).expand_as(size)
    owner = number  # current patch that holds each original one
    for block, wanted in enumerate(schedule):

        def weight(name: str, block: int = block) -> Tensor:
            return vector[f"blocks{block}_{name}"]

        whole = torch.cat([prefix, patches], 1)
        sizes = torch.cat([torch.ones(len(x), prefix.shape[1]), size], 1)
        normed = F.layer_norm(whole, whole.shape[-1:], weight("norm1_weight"), weight("norm1_bias"), eps)
        qkv = F.linear(normed, weight("attn_qkv_weight"), weight("attn_qkv_bias"))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        bias = size_bias(sizes) if vector.param("prop_attn", True) else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        whole = whole + F.linear(attended, weight("attn_proj_weight"), weight("attn_proj_bias"))
        prefix, patches = whole[:, : int(cls)], whole[:, int(cls) :]

        n = patches.shape[1]
        left = n - min(wanted, n // 2)
        metric = k.mean(1)[:, int(cls) :]
        keep = torch.full((len(x),), left)
        kept, patches, assign, number = tome(patches, metric, size, torch.ones_like(size).bool(), keep, number, int(cls), reorder=not cls)
        total = torch.zeros_like(size).scatter_add_(1, assign, size)
        index = kept.nonzero()[:, 1].view(len(x), left)
        patches, size, number = _rows(patches, index), total.gather(1, index), number.gather(1, index)
        owner = (kept.long().cumsum(1) - 1).gather(1, assign).gather(1, owner)

        whole = torch.cat([prefix, patches], 1)
        normed = F.layer_norm(whole, whole.shape[-1:], weight("norm2_weight"), weight("norm2_bias"), eps)
        hidden = F.gelu(F.linear(normed, weight("mlp_fc1_weight"), weight("mlp_fc1_bias")))
        whole = whole + F.linear(hidden, weight("mlp_fc2_weight"), weight("mlp_fc2_bias"))
        prefix, patches = whole[:, : int(cls)], whole[:, int(cls) :]
        if vector.has(f"after_block{block}"):
            close(f"after_block{block}", torch.cat([prefix, _rows(patches, number.argsort(1))], 1), vector[f"after_block{block}"])

    order = number.argsort(1)
    close("out", torch.cat([prefix, _rows(patches, order)], 1), vector["out"])
    close("size_out", torch.cat([torch.ones(len(x), prefix.shape[1]), size.gather(1, order)], 1), vector["size_out"].view(len(x), -1))
    group = order.argsort(1).gather(1, owner) + int(cls)
    same_index("group_of_token", torch.cat([torch.zeros(len(x), int(cls), dtype=torch.int64), group], 1), vector["group_of_token"])


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
