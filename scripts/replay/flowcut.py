"""Vectors `flowcut-*` (authors' code): one scoring step, a whole CLIP encoder, the LLM stage, the Qwen2-VL tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.flowcut import accumulate, flow_score, flowcut, last_row, prune_amount, semantic_row, value_strength
from vtr.ops.gather import take
from vtr.ops.topk import topk_mask


def replay(vector: Vector) -> None:
    if vector.has("cls_attention", "value_headmean"):
        _step(vector)
    elif vector.has("input", "features_select_layer"):
        _encoder(vector)
    elif vector.has("query_last", "visual_keys"):
        _llm(vector)
    elif vector.has("input", "qkv_weights"):
        _qwen(vector)
    else:
        raise vector.unknown_schema()


def _everything(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns part and real of a batch of single views that are full: `tokens (G, N, ...)`."""
    return torch.zeros(tokens.shape[:2], dtype=torch.int64), torch.ones(tokens.shape[:2], dtype=torch.bool)


def _step(vector: Vector) -> None:
    attention, semantic = vector["cls_attention"], vector["semantic_attention"]
    part, real = _everything(attention)
    score = flow_score(attention, semantic, value_strength(vector["value_headmean"][:, :, None]), part, real)
    close("score", score, vector["score"])
    cumulative = accumulate(vector["cumulative_prev"], score)
    close("cumulative", cumulative, vector["cumulative"])

    table = vector["prune_table_per_image"]
    amounts = []
    for remaining, keep in table[:, :2].tolist():
        target = torch.full((len(attention), 1), keep)
        amounts.append(prune_amount(attention, part, real, target, remaining).flatten())
    amount = torch.stack(amounts)  # (rows of the table, images)
    same_index("prune_table_per_image", amount.round(), table[:, 2:])
    same_index("prune_table", amount.amax(1).round(), vector["prune_table"][:, 2])
    target = torch.full((len(attention), 1), int(table[0, 1]))
    kept = flowcut(vector["cumulative"], amount[0].amax().expand(len(attention), 1), part, real, target)
    index = kept.nonzero()[:, 1].view(len(attention), -1)
    same_index("kept_after_first_row", index, vector["kept_after_first_row"])


def _encoder(vector: Vector) -> None:
    heads, layers = vector.param("heads"), vector.param("num_layers")
    hidden = vector["input"]
    patch = torch.arange(hidden.shape[1] - 1).expand(len(hidden), -1)
    cumulative, log, feature = None, [], layers - 2
    for layer in range(layers):
        before = patch.shape[1]
        if layer == feature + 1:  # runs after the features are read
            log.append([layer, feature - 1 - layer, before, before])
            break
        weights = {name.split(".", 2)[2]: t for name, t in vector.tensors.items() if name.startswith(f"layers.{layer}.")}
        hidden, query, key, value = _clip_layer(hidden, weights, heads, vector.param("act", "quick_gelu"))
        patch, hidden, cumulative = prune_layer(patch, hidden, cumulative, query, key, value, feature - 1 - layer, vector.param("target"))
        log.append([layer, feature - 1 - layer, before, patch.shape[1]])
        if layer == feature:
            close("features_select_layer", hidden, vector["features_select_layer"])
            same_index("kept_patches", patch, vector["kept_patches"])
    same_index("layer_log", torch.tensor(log), vector["layer_log"])


def _clip_layer(x: Tensor, w: dict[str, Tensor], heads: int, act: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns a CLIP layer and its q, k, v `(B, S, H, d)`."""
    normed = F.layer_norm(x, x.shape[-1:], w["layer_norm1.weight"], w["layer_norm1.bias"], 1e-5)
    q, k, v = (F.linear(normed, w[f"self_attn.{n}_proj.weight"], w[f"self_attn.{n}_proj.bias"]).unflatten(-1, (heads, -1)) for n in "qkv")
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
    x = x + F.linear(mixed, w["self_attn.out_proj.weight"], w["self_attn.out_proj.bias"])
    normed = F.layer_norm(x, x.shape[-1:], w["layer_norm2.weight"], w["layer_norm2.bias"], 1e-5)
    inner = F.linear(normed, w["mlp.fc1.weight"], w["mlp.fc1.bias"])
    inner = inner * torch.sigmoid(1.702 * inner) if act == "quick_gelu" else F.gelu(inner)
    return x + F.linear(inner, w["mlp.fc2.weight"], w["mlp.fc2.bias"]), q, k, v


def prune_layer(
    patch: Tensor, hidden: Tensor, cumulative: Tensor | None, query: Tensor, key: Tensor, value: Tensor, remaining: int, keep: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the authors' code does behind a layer of a CLIP tower, for q, k, v `(B, 1 + N, H, d)` of that layer; the batch shares one count."""
    if patch.shape[1] <= keep:
        return patch, hidden, cumulative
    part, real = _everything(patch)
    logits = torch.einsum("bhd,bnhd->bhn", query[:, 0], key) * query.shape[-1] ** -0.5
    attention = logits.softmax(-1).mean(1)[:, 1:]
    score = flow_score(attention, semantic_row(value[:, 1:], value[:, :1], part, real), value_strength(value[:, 1:]), part, real)
    cumulative = accumulate(cumulative, score)
    if remaining % 2:
        return patch, hidden, cumulative
    target = torch.full((len(patch), 1), keep)
    amount = prune_amount(attention, part, real, target, remaining)
    kept = flowcut(cumulative, amount.amax().expand_as(amount), part, real, target)
    index = kept.nonzero()[:, 1].view(len(patch), -1)
    return take(patch, index), torch.cat([hidden[:, :1], take(hidden[:, 1:], index)], 1), take(cumulative, index)


def _llm(vector: Vector) -> None:
    keys, values = (vector[n].transpose(0, 1)[None] for n in ("visual_keys", "visual_values"))  # (1, V, H, d)
    part, real = _everything(keys)
    relation = last_row(vector["query_last"][None], keys, real)
    semantic = last_row(vector["value_last"][None], values, real)
    score = flow_score(relation, semantic, value_strength(values), part, real)
    for name, got in (("relation", relation), ("semantic", semantic), ("score", score)):
        close(name, got[0], vector[name])
    kept = topk_mask(score, real, torch.tensor([vector.param("target")]))[0]
    same_index("kept", kept.nonzero().flatten(), vector["kept"])


def _qwen(vector: Vector) -> None:
    heads, blocks, keep = vector.param("heads"), vector.param("blocks"), vector.param("vit_target")
    hidden, cumulative, lengths = vector["input"][None], None, [vector["input"].shape[0]]
    for block in range(blocks):
        normed = hidden * hidden.square().mean(-1, keepdim=True).rsqrt()
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (normed @ vector["qkv_weights"][block]).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        hidden = hidden + mixed.transpose(1, 2).flatten(2)
        remaining = blocks - 1 - block
        if hidden.shape[1] > keep:
            part, real = _everything(hidden)
            attention = last_row(q.mean(1), k, real)
            score = flow_score(attention, None, value_strength(v), part, real)
            cumulative = accumulate(cumulative, score)
            if block == 0:
                close("relation_layer0", attention[0], vector["relation_layer0"])
                close("score_layer0", score[0], vector["score_layer0"])
            if remaining % 2 == 0:
                target = torch.tensor([[keep]])
                amount = prune_amount(attention, part, real, target, remaining, eps=1e-7)
                index = flowcut(cumulative, amount, part, real, target).nonzero()[:, 1][None]
                hidden, cumulative = take(hidden, index), take(cumulative, index)
        lengths.append(hidden.shape[1])
    same_index("tokens_per_layer", torch.tensor(lengths), vector["tokens_per_layer"])
    close("output", hidden[0], vector["output"])
