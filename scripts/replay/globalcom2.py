"""Vectors `globalcom2-*` (authors' code): ratios, indices and the token sequence of one AnyRes image."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.globalcom2 import combined_scores, crop_shares
from vtr.ops.canvas import block_sums, canvas_cells, crops_of, spread_over, valid_region
from vtr.ops.parts import board, members


def replay(vector: Vector) -> None:
    if not vector.has("base_scores", "crop_scores", "crop_kept_indices"):
        raise vector.unknown_schema()
    side, ratio = vector.param("grid_side"), vector.param("retention_ratio")
    patch_grid, crop_grid = (side, side), (vector.param("num_patch_height"), vector.param("num_patch_width"))
    number, grid = crop_grid[0] * crop_grid[1], torch.tensor([crop_grid])
    width, height = vector.param("image_size_wh")
    cells = _valid_cells(valid_region((height, width), crop_grid, patch_grid), grid, patch_grid)
    view, flat = cells[:, 0], cells[:, 1] * side + cells[:, 2]
    score = torch.cat([vector["base_scores"][None], vector["crop_scores"]])[view, flat][None]
    real = torch.ones_like(score, dtype=torch.bool)

    lies, crops = board(cells[None], real, number + 1, side), crops_of([crop_grid], [patch_grid], side, cells.device)
    laid = lies.lay(score, -torch.inf)
    there = laid > -torch.inf
    local = torch.where(there, laid, 0)
    sums = block_sums(local[:, 0], crops.blocks)
    close("crop_score_sums", sums[0], vector["crop_score_sums"])
    shares = crop_shares(sums, crops.number, vector.param("temperature"))
    close("scales", (ratio * shares).clamp_max(1)[0], vector["scales"])
    valid = there.sum((2, 3))
    same_index("crop_valid_counts", valid[0, 1:], vector["crop_valid_counts"])
    close("global_scores_interpolated", spread_over(local[:, 0], there[:, 1:], crops)[there[:, 1:]], vector["global_scores_interpolated"])

    counts = torch.cat([torch.tensor([[int(side * side * ratio)]]), authors_counts(shares, valid[:, 1:], ratio)], 1)
    keep = lies.topk(combined_scores(local, there, crops).masked_fill(~there, -torch.inf), counts, int(counts.max()))[0]
    kept = [keep[view == j].nonzero().flatten() for j in range(1, number + 1)]
    same_index("crop_kept_indices", torch.cat(kept), vector["crop_kept_indices"])
    same_index("crop_kept_offsets", torch.tensor([0, *map(len, kept)]).cumsum(0), vector["crop_kept_offsets"])
    sequences = {
        "output_tokens": authors_sequence(keep, score[0], cells, crop_grid, patch_grid),
        "output_tokens_true_grid": authors_sequence(keep, score[0], cells, crop_grid, patch_grid, true_cells=True),
    }
    same_index("thumbnail_indices", flat[sequences["output_tokens"][: int(counts[0, 0])]], vector["thumbnail_indices"])
    for name, sequence in sequences.items():
        if vector.has(name):
            tokens = vector["features"][view[sequence], flat[sequence]]
            close(name, torch.where(sequence[:, None] < 0, vector["image_newline"], tokens), vector[name])


def _valid_cells(region: list[int], crop_grid: torch.Tensor, patch_grid: tuple[int, int]) -> torch.Tensor:
    """Returns `(N, 3)` cells of the thumbnail, then of the valid canvas tokens, crop by crop."""
    views = int(crop_grid.prod()) + 1
    cells = torch.cartesian_prod(torch.arange(views), torch.arange(patch_grid[0]), torch.arange(patch_grid[1]))
    row, col = (c[0] for c in canvas_cells(cells[None], crop_grid, patch_grid))
    top, bottom, left, right = region
    inside = (row >= top) & (row < bottom) & (col >= left) & (col < right)
    return cells[inside | (cells[:, 0] == 0)]


def authors_counts(share: Tensor, valid: Tensor, ratio: float) -> Tensor:
    """Tokens every crop keeps in the released code: `(G, crops)` int64 from `share` and valid counts; the total is not exact."""
    return (valid * (ratio * share).clamp_max(1)).long()


def authors_sequence(
    keep: Tensor, score: Tensor, cells: Tensor, crop_grid: tuple[int, int], patch_grid: tuple[int, int], true_cells: bool = False
) -> Tensor:
    """Returns the released code's order of one image's tokens in the LLM: thumbnail by falling score, then the canvas with all its newlines.

    `keep (N,)` bool, `score (N,)`, `cells (N, 3)` of all valid tokens. A kept token is written into its crop at the place it has among
    the crop's valid tokens; `true_cells=True` writes it into its own cell. Returns int64 indices into N, -1 for a newline.
    """
    (rows, cols), view = patch_grid, cells[:, 0]
    thumbnail = ((view == 0) & keep).nonzero().flatten()
    thumbnail = thumbnail[score[thumbnail].argsort(descending=True, stable=True)]
    member = members(view[None], torch.ones_like(keep)[None], crop_grid[0] * crop_grid[1] + 1)[0]
    place = member.long().cumsum(1).gather(0, view[None])[0] - 1
    written = cells if true_cells else torch.stack([view, place // cols, place % cols], 1)
    row, col = (c[0] for c in canvas_cells(written[None], torch.tensor([crop_grid]), patch_grid))
    width = crop_grid[1] * cols + 1
    canvas = torch.full((crop_grid[0] * rows, width), -2)
    canvas[:, -1] = -1
    shown = keep & (view > 0)
    canvas[row[shown], col[shown]] = torch.arange(len(keep))[shown]
    return torch.cat([thumbnail, canvas[canvas > -2]])
