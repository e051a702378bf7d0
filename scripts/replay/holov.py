"""HoloV vectors: attention and features -> crop scores, quotas and tokens of the released code; the default and the paper's rule beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.holov import bands, dealt, holistic_score, holov
from vtr.ops.split import Parts, gather_parts

SCALE, GAMMA = 1000.0, 0.09  # obananas/HoloV llava/model/utils.py at 1d2e65e


def replay(vector: Vector) -> None:
    if not vector.has("features", "score", "quota"):
        raise vector.unknown_schema()
    features, score, quota = vector["features"], vector["score"], vector["quota"]
    if vector.has("cls_attention"):
        made = vector["cls_attention"][..., 1:].mean(1)
        close("score", made, score)
    rows, n = score.shape
    crops = min(int(vector.param("crops")), n)  # empty ones are skipped
    real = torch.ones(rows, n, dtype=torch.bool)
    kept = vector["kept"] if vector.has("kept") else vector["kept_order"]
    number = int(vector.param("keep", kept.shape[1]))
    keep = torch.full((rows,), number)

    def default(features: Tensor | None) -> Tensor:
        mask = holov(score.double(), real, keep, [n] * rows, [number] * rows, crops, float(vector.param("tau", 1.0)), features)
        return mask.nonzero()[:, 1].view(rows, number)

    cut = bands(real, [n] * rows, [crops] * rows)
    own, there = gather_parts(score.double(), cut), cut.real.flatten(0, 1)
    if vector.has("holistic"):
        found = holistic_score(own, gather_parts(features.double(), cut), there)
        close("holistic", _whole(found, cut, n), vector["holistic"])
    if vector.has("kept"):
        rule, tau = vector.param("rule", "holistic"), float(vector.param("tau", 1.0))
        mean = torch.where(there, own, 0).sum(1).view_as(cut.keep) / cut.keep.clamp_min(1)
        same_index("quota", dealt(mean**tau, cut.keep, keep, crops + 1), quota)
        same_index("kept", default(features.double() if rule == "holistic" else None), kept)
        return

    crop_score = authors_crop_score(score, features, cut, float(vector.param("alpha", GAMMA)))
    close("crop_score", crop_score, vector["crop_score"], atol=1e-5)
    authors = authors_quota(crop_score, number)
    same_index("quota", authors, quota)
    same_index("kept_order", authors_order(score, authors, cut, number), kept)
    if vector.has("default_kept"):
        same_index("default_kept", default(None), vector["default_kept"])


def authors_crop_score(score: Tensor, features: Tensor, cut: Parts, gamma: float = GAMMA) -> Tensor:
    """Mean of scaled attention and rescaled variance of each crop, `(G, C)`; a crop of one token has its attention as it is."""
    own, there = gather_parts(score.double(), cut), cut.real.flatten(0, 1)
    holistic = holistic_score(SCALE * own, gather_parts(features.double(), cut), there)
    both = SCALE * own + gamma * (holistic - SCALE * own)
    both = torch.where(there.sum(1, keepdim=True) > 1, both, own)
    mean = torch.where(there, both, 0).sum(1) / there.sum(1).clamp_min(1)
    return mean.view(cut.keep.shape).float()


def authors_quota(crop_score: Tensor, keep: int) -> Tensor:
    """Shares `(G, C)` of the released code: rounded down, the rest one each to the heaviest, whatever the crops have."""
    weight = crop_score / (crop_score.sum(1, keepdim=True) + 1e-6)
    share = (weight * keep).floor().long()
    rank = weight.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return share + (rank < keep - share.sum(1, keepdim=True)).long()


def authors_order(score: Tensor, quota: Tensor, cut: Parts, keep: int) -> Tensor:
    """Tokens `(G, keep)` in the order of the released code: crop by crop, a cut crop by score; -1 for zero vectors at the end."""
    found = []
    for g, shares in enumerate(quota.tolist()):
        row: list[int] = []
        for c, share in enumerate(shares):
            tokens = cut.token[g, c][cut.real[g, c]]
            if share < len(tokens):
                tokens = tokens[score[g, tokens].argsort(descending=True, stable=True)[:share]]
            row += tokens.tolist()
        found.append((row + [-1] * keep)[:keep])
    return torch.tensor(found)


def _whole(parts: Tensor, cut: Parts, n: int) -> Tensor:
    """Values of crops `(G * C, W)` as values of tokens `(G, N)`."""
    spot = torch.where(cut.real, cut.token, n).flatten(1)
    return torch.zeros(len(spot), n + 1, dtype=parts.dtype).scatter(1, spot, parts.view(len(spot), -1))[:, :n]
