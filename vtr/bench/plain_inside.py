"""Plain references: published selections inside the tower and the LLM, as `plain` has those in front of the LLM."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.bench.plain import best


def tome(tokens: Tensor, metric: Tensor, size: Tensor, remove: int) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's merge of a batch: every second token is a source, and the `remove` most similar ones join their nearest of the others.

    Args:
        tokens: `(B, T, D)`; metric: `(B, T, d)`; size: `(B, T, 1)`, tokens that each stands for. The first token is a source that never goes.

    Returns:
        Tokens `(B, T - remove, D)`, first the sources left and then the others; their sizes; and their positions `(B, T - remove)`.
    """
    unit = F.normalize(metric.float(), dim=-1)
    score = unit[:, ::2] @ unit[:, 1::2].mT
    score[:, 0] = -torch.inf
    similarity, into = score.max(-1)
    order = similarity.argsort(dim=-1, descending=True)
    gone, stays = order[:, :remove, None], order[:, remove:].sort(dim=-1).values[..., None]
    into = into[..., None].gather(1, gone)

    def joined(values: Tensor) -> Tensor:
        width = values.shape[-1]
        source, other = values[:, ::2], values[:, 1::2]
        left = source.gather(1, stays.expand(-1, -1, width))
        moved = source.gather(1, gone.expand(-1, -1, width))
        return torch.cat([left, other.scatter_add(1, into.expand(-1, -1, width), moved)], 1)

    sizes = joined(size)
    place = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    kept = torch.cat([place[:, ::2].gather(1, stays[..., 0]), place[:, 1::2]], 1)
    return joined(tokens * size) / sizes, sizes, kept


def flowcut(
    row: Tensor, cls_value: Tensor, values: Tensor, before: Tensor, target: int, remaining: int, history: float = 0.5
) -> tuple[Tensor, Tensor]:
    """One pruning layer of one image.

    Args:
        row: `(V, n)` attention from CLS of each view; cls_value: `(V, H, d)`; values: `(V, n, H, d)`.
        before: `(V, n)`, scores accumulated so far.
        target: patches of a view that are left in the end; remaining: layers still to come.

    Returns:
        Kept positions `(K,)` over all views, and the new accumulated scores `(V, n)`.
    """
    scores, amounts = [], []
    for view in range(len(row)):
        both = torch.cat([cls_value[view][None], values[view]]).transpose(0, 1)  # (H, 1 + n, d)
        semantic = (cls_value[view][:, None] @ both.mT).softmax(-1)[:, 0, 1:].mean(0)
        share = row[view] / row[view].sum()
        strength = values[view].mean(1).abs().sum(-1)
        score = (share + semantic / semantic.sum()) * strength
        scores.append(history * before[view] + (1 - history) * score)
        n = len(score)
        entropy = -(share * share.log()).sum()
        amounts.append(float((n - target) / math.sqrt(remaining) * (1 - (entropy / math.log(n)) ** 2)))
    n = row.shape[1]
    left = max(n - round(min(max(*amounts, 0.0), n)), target)
    return torch.cat([best(score, left) + view * n for view, score in enumerate(scores)]), torch.stack(scores)


def fastv(query: Tensor, key: Tensor, start: int, count: int, keep: int) -> Tensor:
    """Attention of the last token, `query (H, d)`, to all `key (H, L, d)`; the best of the `count` visual tokens from `start` on."""
    row = (query[:, None] @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(0)[0]
    return best(row[start : start + count], keep)


def pyramiddrop(query: Tensor, visual: Tensor, text: Tensor, keep: int) -> Tensor:
    """The same of one drop, from keys `visual (N, H, d)` and `text (M, H, d)` and the last token's query `(H, d)`."""
    key = torch.cat([visual, text]).transpose(0, 1)
    return fastv(query, key, 0, len(visual), keep)


def v2drop(entered: Tensor, left: Tensor, keep: int) -> Tensor:
    """What a layer changed most: `(N, D)` in front of it and behind it."""
    return best((left - entered).norm(dim=-1), keep)


def dart(tokens: Tensor, key: Tensor, text: Tensor, text_key: Tensor, keep: int, pivots: int = 4) -> Tensor:
    """Pivot after pivot takes the tokens least similar to it.

    `tokens (N, D)` and `text (M, D)` are behind the final norm; `key (N, E)` and `text_key (M, E)` say how strong a token is.
    """
    image = key.norm(p=1, dim=-1).topk(pivots).indices.sort().values.tolist()
    asked = text_key.norm(p=1, dim=-1).topk(pivots).indices.sort().values.tolist()
    chosen, candidates = list(image), [i for i in range(len(tokens)) if i not in image]
    both = [tokens[i] for i in image] + [text[i] for i in asked]
    share, more = divmod(keep - pivots, len(both))
    for number, pivot in enumerate(both):
        cosine = F.cosine_similarity(tokens[candidates], pivot[None], dim=-1)
        taken = set(cosine.topk(share + (number < more), largest=False).indices.tolist())
        chosen += [token for place, token in enumerate(candidates) if place in taken]
        candidates = [token for place, token in enumerate(candidates) if place not in taken]
    return torch.tensor(sorted(chosen), device=tokens.device)


def sparsevlm(embedded: Tensor, text: Tensor, rows: Tensor, tokens: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """One stage: text tokens that the image points at rate it, and of what is pruned the best are made into clusters.

    Args:
        embedded: `(N, D)` visual, text: `(M, D)` input embeddings; rows: `(M, N)` attention of the text; tokens: `(N, D)` here.
    """
    pointed = (embedded @ text.T).softmax(-1).mean(0)
    score = rows[pointed > pointed.mean()].mean(0)
    n = len(score)
    counts = {k: int((n - k) * 0.3 + 1) // 10 + 1 if n > k else 0 for k in range(keep + 1)}
    kept = max(max((k for k in counts if k + counts[k] <= keep), default=0), keep - keep // 2)
    clusters, recycled = keep - kept, int((n - kept) * 0.3) + 1
    order = score.argsort(descending=True)
    again = order[kept : kept + recycled]
    features = tokens[again].double()
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / features.shape[1] ** 0.5
    density = (-distance.topk(clusters, largest=False).values.square().mean(1)).exp()
    apart = torch.where(density[None] > density[:, None], distance, torch.inf).amin(1)
    apart = torch.where(apart.isinf(), distance.max(), apart)
    center = (apart * density).argsort(descending=True)[:clusters]
    cluster = distance[:, center].argmin(1)
    cluster[center] = torch.arange(clusters, device=center.device)
    member = F.one_hot(cluster, clusters).double()
    merged = (member.T @ features / (member.sum(0) + 1e-6)[:, None]).to(tokens.dtype)
    place, order = torch.cat([order[:kept], again[center]]).sort()
    return place, torch.cat([tokens[score.argsort(descending=True)[:kept]], merged])[order]
