"""Plain references: published selections in front of the LLM as one would write them down from the paper, one image at a time.

Each function is a straightforward implementation of the algorithm on the method's page, with the counts that the methods here keep (exact budgets,
shares by largest remainder), for one image without padding. They are what `vtr bench --ops` times the methods against, and what tests compare
selections with. Nothing is copied from the authors' code. They loop, index by lists and wait for the device, as such code does. They use torch only.

All return the kept positions `(K,)` int64, ascending, and where tokens are merged the values at them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def best(score: Tensor, keep: int) -> Tensor:
    """Returns the `keep` best of `score (N,)`."""
    return score.topk(keep).indices.sort().values


def shared_out(weight: Tensor, room: Sequence[int], total: int) -> list[int]:
    """Returns `total` shared out over parts in proportion to their weight, by largest remainder; what a full part cannot take goes to the others."""
    share, open_ = [0] * len(room), list(range(len(room)))
    while open_:
        left = total - sum(share[i] for i in range(len(room)) if i not in open_)
        own = weight[open_].double()
        wanted = (own / own.sum() * left).tolist()
        full = [i for i, value in zip(open_, wanted, strict=True) if value >= room[i]]
        if not full:
            floor = [int(value) for value in wanted]
            by_rest = sorted(range(len(open_)), key=lambda i: -round(wanted[i] - floor[i], 9))
            for i in by_rest[: left - sum(floor)]:
                floor[i] += 1
            for i, value in zip(open_, floor, strict=True):
                share[i] = value
            break
        for i in full:
            share[i] = room[i]
        open_ = [i for i in open_ if i not in full]
    return share


def divprune(tokens: Tensor, keep: int) -> Tensor:
    """Max-min diversity of `tokens (N, D)`: the distances of all to all, and at every pick the smallest to the picked ones."""
    unit = F.normalize(tokens.float(), dim=-1)
    distance = 1 - unit @ unit.T
    picked = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picked) < keep:
        nearest = distance[picked].amin(0)
        nearest[picked] = -1
        picked.append(int(nearest.argmax()))
    return torch.tensor(sorted(picked), device=tokens.device)


def visionzip(tokens: Tensor, keys: Tensor, row: Tensor, keep: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Dominant tokens by CLS attention `row (N,)`; evenly spaced ones of the rest take in the others by `keys (N, H, d)`."""
    dominant = row.topk(keep - contextual).indices
    other = torch.ones_like(row, dtype=torch.bool)
    other[dominant] = False
    rest = other.nonzero()[:, 0]
    metric = F.normalize(keys.float().mean(1)[rest], dim=-1)
    step = max(1, len(rest) // contextual)
    pivot = torch.arange(0, step * contextual, step, device=row.device)
    source = torch.ones(len(rest), dtype=torch.bool, device=row.device)
    source[pivot] = False
    into = (metric[source] @ metric[pivot].T).argmax(1)
    member = F.one_hot(into, contextual).to(tokens.dtype)
    values = tokens[rest]
    mean = member.T @ values[source] / member.sum(0).clamp_min(1)[:, None]
    kept, order = torch.cat([dominant, rest[pivot]]).sort()
    return kept, torch.cat([tokens[dominant], values[pivot] + mean])[order]


def vispruner(features: Tensor, row: Tensor, keep: int, important_ratio: float = 0.5) -> Tensor:
    """The most attended of `features (N, D)`; of the rest, 8 near duplicates after the other go."""
    first = int(keep * important_ratio)
    order = row.argsort(descending=True, stable=True)
    unit = F.normalize(features.float(), dim=-1)
    residual, diverse = order[first:], keep - first
    while diverse and len(residual) > diverse:
        compared, between = residual[::2], residual[1::2]
        similar = (unit[compared] @ unit[between].T).amax(1).argsort(descending=True, stable=True)
        residual = torch.cat([compared[similar[min(8, len(residual) - diverse) :]], between])
    return torch.cat([order[:first], residual[:diverse]]).sort().values


def cdpruner(tokens: Tensor, text: Tensor, keep: int) -> Tensor:
    """Greedy MAP of a DPP in each view of `tokens (V, n, D)`, by cosine to the mean of `text (M, D)`, scaled over the image."""
    views, n, _ = tokens.shape
    relevance = F.cosine_similarity(tokens.float(), text.float().mean(0)[None, None], dim=-1)
    quality = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kept = []
    for view, share in enumerate(shared_out(torch.ones(views), [n] * views, keep)):
        unit = F.normalize(tokens[view].float(), dim=-1)
        kernel = quality[view][:, None] * (unit @ unit.T) * quality[view]
        left, rows = kernel.diagonal().clone(), kernel.new_zeros(share, n)
        for count in range(share):
            pick = int(left.argmax())
            rows[count] = (kernel[pick] - rows[:count, pick] @ rows[:count]) / left[pick].sqrt()
            left -= rows[count].square()
            left[pick] = -torch.inf
            kept.append(view * n + pick)
    return torch.tensor(sorted(kept), device=tokens.device)


def prumerge(tokens: Tensor, query: Tensor, keys: Tensor, keep: int, neighbours: int = 32) -> tuple[Tensor, Tensor]:
    """The most attended of `tokens (N, D)` add their nearest by key; one more is made of the rest.

    `query (C,)` of CLS and `keys (1 + N, C)` are of one head as wide as all together.
    """
    attention = (keys.float() @ query.float() * len(query) ** -0.5).softmax(0)[1:]
    chosen = attention.topk(keep - 1).indices
    unit = F.normalize(keys[1:].float(), dim=-1)
    grown = tokens.clone()
    for token in chosen.tolist():
        cosine = unit @ unit[token]
        cosine[token] = -torch.inf
        near = cosine.topk(neighbours).indices
        grown[token] = tokens[token] + (attention[near, None] * tokens[near]).sum(0)
    share = attention.clone()
    share[chosen] = 0
    extra = share.argmax()
    grown[extra] = (share[:, None] * tokens).sum(0)
    kept = torch.cat([chosen, extra[None]]).sort().values
    return kept, grown[kept]


def hired(late: Tensor, early: Tensor, crops: tuple[int, int], keep: int, alpha: float = 0.5) -> Tensor:
    """CLS attention `late (V, n)` ranks inside views, that of the thumbnail in an early layer `early (n,)` shares the budget out over `crops`."""
    views, n = late.shape
    if views == 1:
        return best(late[0], keep)
    full, side, (rows, cols) = min(int(keep * alpha), n), math.isqrt(n), crops
    blocks = early.double().view(rows, side // rows, cols, side // cols).sum((1, 3)).flatten()
    budget = [full, *shared_out(blocks, [n] * (views - 1), keep - full)]
    return torch.cat([best(late[view], budget[view]) + view * n for view in range(views)])


def globalcom2(score: Tensor, crops: tuple[int, int], keep: int, temperature: float = 10.0) -> Tensor:
    """CLS logits `score (V, n)`: the thumbnail's blocks share the budget out, and its map laid over the crops helps to rank inside them."""
    views, n = score.shape
    side, (rows, cols) = math.isqrt(n), crops
    thumbnail = score[0].view(side, side)
    blocks = thumbnail.double().view(rows, side // rows, cols, side // cols).sum((1, 3)).flatten()
    sigma = ((blocks - blocks.max()) / temperature).exp()
    sigma = sigma / (sigma.sum() + 1e-8)
    share = torch.cat([sigma.new_ones(1), 1 + sigma - sigma.mean()])
    budget = shared_out(share * n, [n] * views, keep)
    spread = F.interpolate(thumbnail[None, None], (rows * side, cols * side), mode="bilinear", align_corners=False)[0, 0]
    kept = [best(score[0], budget[0])]
    for crop in range(rows * cols):
        down, across = crop // cols * side, crop % cols * side
        whole = spread[down : down + side, across : across + side].flatten()
        local = score[crop + 1]
        kept.append(best(local / local.norm() + whole / whole.norm(), budget[crop + 1]) + (crop + 1) * n)
    return torch.cat(kept)


def todre(tokens: Tensor, row: Tensor, keep: int) -> Tensor:
    """Max-sum diversity of `tokens (N, D)` from the token that CLS attends to most, `row (n,)` of the first view."""
    unit = F.normalize(tokens.float(), dim=-1)
    picked = [int(row.argmax())]
    total = unit @ unit[picked[0]]
    total[picked[0]] = torch.inf
    while len(picked) < keep:
        picked.append(int(total.argmin()))
        total += unit @ unit[picked[-1]]
        total[picked[-1]] = torch.inf
    return torch.tensor(sorted(picked), device=tokens.device)


def _cover(rows: Tensor, keep: int, weight: Tensor | None = None) -> Tensor:
    """Greedy coverage of the rows of `(R, N)` by columns."""
    covered = rows.new_zeros(len(rows))
    picked: list[int] = []
    for _ in range(keep):
        gain = (rows - covered[:, None]).clamp_min(0).sum(0)
        score = gain if weight is None else gain * weight
        score[picked] = -torch.inf
        picked.append(int(score.argmax()))
        covered = torch.maximum(covered, rows[:, picked[-1]])
    return torch.tensor(sorted(picked), device=rows.device)


def scope(features: Tensor, row: Tensor, keep: int) -> Tensor:
    """Coverage of `features (N, D)` by cosines, times the attention of CLS `row (N,)`."""
    unit = F.normalize(features.float(), dim=-1)
    return _cover(unit @ unit.T, keep, row)


def mmtok(tokens: Tensor, features: Tensor, text: Tensor, keep: int, tau_text: float = 0.02, tau_vision: float = 0.2) -> Tensor:
    """Coverage of text `(M, D)` and image by `tokens (N, D)`, where the image covers itself by `features (N, C)`."""
    unit, words, own = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (tokens, text, features))
    asked = (words @ unit.T / tau_text).softmax(-1) / len(words)
    seen = (own @ own.T / tau_vision).softmax(-1) / len(own)
    return _cover(torch.cat([asked, 0.5 * seen]), keep)


def hiprune(shallow: Tensor, deep: Tensor, grid: tuple[int, int], keep: int, alpha: float = 0.1) -> Tensor:
    """Anchors by `shallow (N,)` with their neighbours on the grid, then the best by `deep (N,)`."""
    (rows, cols), near = grid, []
    for anchor in shallow.topk(round(keep * alpha / 5)).indices.tolist():
        row, col = divmod(anchor, cols)
        around = [(row, col), (row, col - 1), (row, col + 1), (row - 1, col), (row + 1, col)]
        near += [r * cols + c for r, c in around if 0 <= r < rows and 0 <= c < cols]
    near = list(dict.fromkeys(near))[:keep]
    rest = deep.clone()
    rest[near] = -torch.inf
    return torch.cat([torch.tensor(near, dtype=torch.int64, device=deep.device), rest.topk(keep - len(near)).indices]).sort().values


def vscan(tokens: Tensor, shallow: Tensor, deep: Tensor, grid: tuple[int, int], keep: int, side: int = 6) -> tuple[Tensor, Tensor]:
    """Half of the budget from windows of `side x side` cells by `shallow (N,)`, the other by `deep (N,)`; the rest joins the nearest by cosine."""
    rows, cols = grid
    cells = torch.arange(rows * cols, device=tokens.device).view(grid)
    windows = [cells[r : r + side, c : c + side].flatten() for r in range(0, rows, side) for c in range(0, cols, side)]
    sizes = [len(window) for window in windows]
    shares = shared_out(torch.tensor(sizes).double(), sizes, keep // 2)
    local = torch.cat([window[shallow[window].topk(k).indices] for window, k in zip(windows, shares, strict=True)])
    rest = deep.clone()
    rest[local] = -torch.inf
    kept = torch.cat([local, rest.topk(keep - len(local)).indices]).sort().values
    other = torch.ones_like(deep, dtype=torch.bool)
    other[kept] = False
    unit = F.normalize(tokens.float(), dim=-1)
    into = (unit[other] @ unit[kept].T).argmax(1)
    total = tokens[kept].float().index_add_(0, into, tokens[other].float())
    count = torch.ones(keep, device=tokens.device).index_add_(0, into, torch.ones(len(into), device=tokens.device))
    return kept, (total / count[:, None]).to(tokens.dtype)


def holov(score: Tensor, keep: int) -> Tensor:
    """Bands of the raster order share the budget by their mean attention; each keeps its best. `score (N,)`."""
    crops = min(max(1024 * len(score) // (576 * keep), 1), len(score))
    bands = score.double().tensor_split(crops)
    weight, size = torch.stack([band.mean() for band in bands]), [len(band) for band in bands]
    open_, share = list(range(crops)), [0] * crops
    while open_:
        left = keep - sum(share[i] for i in range(crops) if i not in open_)
        wanted = (left * weight[open_] / weight[open_].sum()).floor().long().tolist()
        for i in weight[open_].argsort(descending=True, stable=True).tolist()[: left - sum(wanted)]:
            wanted[i] += 1
        full = [i for i, number in zip(open_, wanted, strict=True) if number > size[i]]
        for i, number in zip(open_, wanted, strict=True):
            share[i] = size[i] if i in full else number
        open_ = [i for i in open_ if i not in full] if full else []
    starts = [sum(size[:i]) for i in range(crops)]
    return torch.cat([best(score[start : start + n], k) + start for start, n, k in zip(starts, size, share, strict=True)])


def prunesid(features: Tensor, score: Tensor, keep: int) -> Tensor:
    """Groups by principal components of `features (N, C)`; in each, duplicates are suppressed best first by `score (N,)`."""
    n, groups = len(features), max(keep // 4, 1)
    rows = features.double().sigmoid()
    rows = rows - rows.mean(1, keepdim=True)
    vectors = torch.linalg.eigh(rows @ rows.T)[1].flip(1)[:, :groups].abs()
    group = vectors.argmax(1)
    unit = F.normalize(features.double(), dim=-1)
    cosine = unit @ unit.T
    limit = keep / 32 * (cosine.sum() - cosine.trace()) / (n * (n - 1))
    order, alive = score.double().argsort(descending=True, stable=True).tolist(), torch.ones(n, dtype=torch.bool, device=score.device)
    after = alive.clone()
    for token in order:
        after[token] = False
        if alive[token]:
            alive &= ~(after & (group == group[token]) & (cosine[token] > limit))
    label, lives = group.tolist(), alive.tolist()
    members = [[t for t in order if label[t] == g] for g in range(groups)]
    left = [sum(lives[t] for t in own) for own in members]
    kept: list[int] = []
    for own, number in zip(members, _group_counts([len(own) for own in members], left, keep), strict=True):
        kept += [*(t for t in own if lives[t]), *(t for t in own if not lives[t])][:number]
    return torch.tensor(sorted(kept), device=score.device)


def _group_counts(size: list[int], left: list[int], keep: int) -> list[int]:
    """How many each group of PruneSID keeps: at least one, at most 5 per 64 of the budget and what is left of it, more where that is too little."""
    low, high = [min(number, 1) for number in size], [min(number, 5 * -(-keep // 64)) for number in left]
    rise = 0
    while sum(min(h + rise, n) for h, n in zip(high, size, strict=True)) < keep:
        rise += 1
    high = [min(h + rise, n) for h, n in zip(high, size, strict=True)]
    rest, total, so_far, before, share = max(keep - sum(low), 0), sum(left), 0, 0, []
    for g, number in enumerate(left):
        so_far += number
        reached = round(rest * so_far / max(total, 1))
        share.append(min(reached - before + low[g], high[g]))
        before = reached
    for g in sorted(range(len(size)), key=lambda g: -left[g]):
        more = min(max(keep - sum(share), 0), high[g] - share[g])
        share[g] += more
    return share
