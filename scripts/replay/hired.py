"""HiRED vectors: `hired-*` (authors' code, AnyRes and single view) and `hired-paper-alloc-*` (our reference of Equation 1)."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from vtr.methods.hired import authors_budgets, authors_sequence, authors_totals, crop_scores, hired, paper_budgets
from vtr.ops.topk import topk_mask


def replay(vector: Vector) -> None:
    rate = float(vector.param("token_budget_rate"))
    if vector.has("late_cls_attention", "early_cls_attention_thumb", "mask"):
        _anyres(vector, rate, float(vector.param("alpha")))
    elif vector.has("late_cls_attention", "mask"):
        mask = vector["mask"]
        score = vector["late_cls_attention"][:, -len(mask) :].sum(0)
        keep = torch.tensor([int(len(mask) * rate)])
        got = hired(score[None], score.new_zeros(1, 0), torch.zeros(1, len(mask), dtype=torch.int64), torch.ones(1, len(mask)).bool(), keep)
        same_index("mask", got[0], mask)
    elif vector.has("early_cls_attention_thumb", "crop_score", "crop_budgets"):
        _allocation(vector, rate, float(vector.param("alpha")))
    else:
        raise vector.unknown_schema()


def _anyres(vector: Vector, rate: float, alpha: float) -> None:
    mask = vector["mask"]
    views, n = mask.shape
    early, late = (vector[name][..., -n:].sum(-2) for name in ("early_cls_attention_thumb", "late_cls_attention"))
    full, rest = authors_totals(views, n, rate, alpha)
    budgets = authors_budgets(early, views - 1, rest, alpha)
    same_index("crop_budgets", budgets, vector["crop_budgets"])
    same_index("mask", topk_mask(late, torch.ones_like(mask), torch.cat([torch.tensor([full]), budgets])), mask)
    side = round(n**0.5)
    sequence = authors_sequence(mask, tuple(vector.param("authors_grid_num_w_num_h")), tuple(vector.param("image_size_h_w")), (side, side))
    same_index("feature_len", torch.tensor([len(sequence)]), vector["feature_len"])
    close("packed", vector["features"][tuple(torch.tensor(sequence, dtype=torch.int64).view(-1, 2).unbind(1))], vector["packed"])


def _allocation(vector: Vector, rate: float, alpha: float) -> None:
    grid = (int(vector.param("rows")), int(vector.param("cols")))
    crops, early = grid[0] * grid[1], vector["early_cls_attention_thumb"].double()[:, 1:].sum(0)
    side = round(len(early) ** 0.5)
    cells = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(side), torch.arange(side))
    region = torch.tensor([[0, grid[0] * side, 0, grid[1] * side]])
    score = crop_scores(early[None], cells[None], torch.ones(1, len(early)).bool(), region, torch.tensor([grid]), crops, (side, side))[0]
    close("crop_score", score, vector["crop_score"])
    full, rest = authors_totals(crops + 1, len(early), rate, alpha)
    same_index("full_budget", torch.tensor([full]), vector["full_budget"])
    same_index("crop_budgets", paper_budgets(score, rest, len(early)), vector["crop_budgets"])
