"""HiRED vectors: `hired-*` (authors' code, AnyRes and single view) and `hired-paper-alloc-*` (our reference of Equation 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.ops.canvas import block_sums, canvas_cells, of_crops, shown_blocks, valid_region
from vtr.ops.topk import topk_mask


def replay(vector: Vector) -> None:
    rate = float(vector.param("token_budget_rate"))
    if vector.has("late_cls_attention", "early_cls_attention_thumb", "mask"):
        _anyres(vector, rate, float(vector.param("alpha")))
    elif vector.has("late_cls_attention", "mask"):
        mask = vector["mask"]
        score = vector["late_cls_attention"][:, -len(mask) :].sum(0)
        keep = torch.tensor([int(len(mask) * rate)])
        got = topk_mask(score[None], torch.ones(1, len(mask)).bool(), keep)
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
    region = (0, grid[0] * side, 0, grid[1] * side)
    blocks = of_crops(shown_blocks, [(grid, (side, side), region, crops, side)], early.device)
    score = block_sums(early.view(1, side, side), blocks)[0]
    close("crop_score", score, vector["crop_score"])
    full, rest = authors_totals(crops + 1, len(early), rate, alpha)
    same_index("full_budget", torch.tensor([full]), vector["full_budget"])
    same_index("crop_budgets", paper_budgets(score, rest, len(early)), vector["crop_budgets"])


def authors_totals(views: int, patches: int, rate: float, alpha: float) -> tuple[int, int]:
    """Returns the tokens of the thumbnail and of all crops together in the released code."""
    total = int(views * patches * rate)
    full = min(int(total * alpha), patches)
    return full, min(total - full, (views - 1) * patches)


def paper_budgets(score: Tensor, total: int, patches: int) -> Tensor:
    """Tokens per crop as the paper rounds them, `(crops,)` int64 from scores `(crops,)`; remainders are lost."""
    return (score.double() / score.double().sum() * total).floor().long().clamp_max(patches)


def authors_budgets(early: Tensor, crops: int, total: int, alpha: float) -> Tensor:
    """Tokens per crop in the released code, `(crops,)` int64: top patches of the thumbnail `early (N,)`, counted in equal strips."""
    n = len(early)
    if total == 0:
        return torch.zeros(crops, dtype=torch.int64)
    best = topk_mask(early[None], torch.ones(1, n, dtype=torch.bool), torch.tensor([int(n * (1 - alpha))]))[0]
    count = best.view(crops, -1).sum(1)
    return (count.float() / count.sum().float() * total).long().clamp_max(n)  # float32 as there: it decides what is cut off


def authors_sequence(
    mask: Tensor, crop_grid: tuple[int, int], image_size: tuple[int, int], patch_grid: tuple[int, int]
) -> list[tuple[int, int]]:
    """Returns the released code's tokens in the LLM as `(view, patch)`, from its mask `(views, N)`: stitched and unpadded with the axes swapped."""
    swapped = (crop_grid[1], crop_grid[0])
    view, patch = mask.nonzero().unbind(1)
    cells = torch.stack([view, patch // patch_grid[1], patch % patch_grid[1]], -1)
    row, col = (c[0] for c in canvas_cells(cells[None], torch.tensor([swapped]), patch_grid))
    top, bottom, left, right = valid_region(image_size, swapped, patch_grid)
    inside = (view > 0) & (row >= top) & (row < bottom) & (col >= left) & (col < right)
    place = torch.where(view == 0, patch - mask.shape[1], row * swapped[1] * patch_grid[1] + col)
    order = [i for i in place.argsort().tolist() if inside[i] or view[i] == 0]
    return [(int(view[i]), int(patch[i])) for i in order]
