"""VisionZip vectors (authors' code): CLS attention, keys and features with CLS at 0 -> dominant indices, tokens, an AnyRes packing."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.visionzip import visionzip
from vtr.ops.canvas import canvas_cells
from vtr.ops.gather import index_to_mask


def replay(vector: Vector) -> None:
    if not vector.has("cls_attention", "hidden_states", "key_metric", "tokens"):
        raise vector.unknown_schema()
    hidden, patches = vector["hidden_states"], vector["hidden_states"][:, 1:]
    score = vector["cls_attention"].sum(1)[:, 1:]
    dominant, contextual = int(vector.param("dominant")) - 1, int(vector.param("contextual"))  # CLS is not counted here
    batch = len(hidden)
    keep = torch.full((batch,), dominant + contextual)
    real = torch.ones_like(score, dtype=torch.bool)
    known, number = ([score.shape[1]] * batch, [dominant] * batch), torch.full_like(keep, contextual)
    index, values, _ = visionzip(patches, vector["key_metric"][:, 1:], score, real, keep, number, contextual, known=known)
    kept = index_to_mask(index, None, score.shape[1])

    by_score = 1 + score.argsort(dim=1, descending=True, stable=True)[:, :dominant]
    cls = torch.zeros(batch, 1, dtype=torch.int64)
    pivot = kept & ~index_to_mask(by_score - 1, None, score.shape[1])
    order = torch.stack([authors_order(*row) for row in zip(kept, pivot, strict=True)])
    if vector.has("dominant_index"):
        same_index("dominant_index", torch.cat([cls, by_score], 1), vector["dominant_index"])
    if vector.has("dominant_index_sorted"):
        same_index("dominant_index_sorted", torch.cat([cls, 1 + order[:, :dominant]], 1), vector["dominant_index_sorted"])
    place = torch.searchsorted(index.contiguous(), order)  # of what is kept in position order
    tokens = torch.cat([hidden[:, :1], values.gather(1, place[..., None].expand(-1, -1, hidden.shape[2]))], 1)
    close("tokens", tokens, vector["tokens"])
    if vector.has("packed"):
        width, height = vector.param("grid_width_height")
        side = round(score.shape[1] ** 0.5)
        packed = authors_packed(order[:, :dominant], contextual, (height, width), (side, side))
        close("packed", torch.stack([tokens[view, place] for view, place in packed]), vector["packed"])


def authors_order(keep: Tensor, pivot: Tensor) -> Tensor:
    """Returns indices into one view's `N` patches in the released code's order: dominant ones by position, then pivots; CLS comes first."""
    return torch.cat([(keep & ~pivot).nonzero().flatten(), (keep & pivot).nonzero().flatten()])


def authors_packed(dominant: Tensor, pivots: int, crop_grid: tuple[int, int], patch_grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns the released code's order of an AnyRes image: `(view, place)` of each token of `tokens (views, 1 + dominant + pivots)`.

    `dominant (views, K)` int64 holds the dominant patches of each view, ascending. The thumbnail comes first, as it is; then the crops'
    dominant patches in raster order of the canvas, their CLS tokens, their pivots.
    """
    views, count = dominant.shape
    view = torch.arange(1, views)[:, None].expand(-1, count)
    cells = torch.stack([view, dominant[1:] // patch_grid[1], dominant[1:] % patch_grid[1]], -1).flatten(0, 1)
    row, col = (c[0] for c in canvas_cells(cells[None], torch.tensor([crop_grid]), patch_grid))
    order = (row * crop_grid[1] * patch_grid[1] + col).argsort().tolist()
    crops = range(1, views)
    packed = [(0, place) for place in range(1 + count + pivots)]
    packed += [(1 + at // count, 1 + at % count) for at in order]
    return packed + [(v, 0) for v in crops] + [(v, 1 + count + p) for v in crops for p in range(pivots)]
