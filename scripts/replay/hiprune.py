"""HiPrune vectors (authors' code): attention maps or scores of two layers -> anchors and buffers, kept tokens; and the default beside them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.hiprune import anchor_count, hiprune, neighbours, raster_neighbours


def replay(vector: Vector) -> None:
    if not vector.has("shallow_score", "deep_score", "kept_index"):
        raise vector.unknown_schema()
    shallow, deep = vector["shallow_score"], vector["deep_score"]
    if vector.has("shallow_attention", "deep_attention"):
        maps = (vector["shallow_attention"], vector["deep_attention"])
        order = vector["window_index"] if vector.has("window_index") else None
        made = [_received(attention.double(), shallow.numel(), order) for attention in maps]
        close("shallow_score", made[0], shallow.double())
        close("deep_score", made[1], deep.double())
        shallow, deep = made[0], made[1]
    if shallow.ndim == 1:
        shallow, deep = shallow[None], deep[None]
    rows, cols = vector.param("grid")
    keep, alpha = vector.param("keep_per_crop", None) or vector.param("keep"), float(vector.param("alpha"))
    views, n = shallow.shape
    real = torch.ones(views, n, dtype=torch.bool)
    number = anchor_count(keep, alpha)
    if vector.has("anchor_index"):
        same_index(
            "anchor_index", shallow[0].argsort(descending=True, stable=True)[:number].sort().values, vector["anchor_index"].sort().values
        )

    budget, anchors = torch.full((views,), keep), torch.full((views,), number)
    wrapped = raster_neighbours(views, n, cols)
    kept, near = hiprune(shallow, deep, wrapped, real, budget, anchors, number)
    same_index("anchor_buffer_index", near.nonzero()[:, 1], _sorted_parts(vector))
    if vector.has("window_index"):  # scores are sums of columns, so that taking 1 off does not take a token out
        again = (deep - near.to(deep.dtype)).argsort(dim=1, descending=True, stable=True)[:, : keep - int(near.sum())]
        kept = near.scatter(1, again, True)
    want = vector["kept_index"]
    same_index("kept_index", kept.nonzero()[:, 1], want.flatten())
    if vector.has("index_mask"):
        same_index("index_mask", kept, vector["index_mask"].view_as(kept))

    if vector.has("default_kept"):
        cells = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(cols)).expand(views, n, 3)
        default, _ = hiprune(shallow, deep, neighbours(cells, real, 1, (rows, cols)), real, budget, anchors, number)
        same_index("default_kept", default.nonzero()[:, 1], vector["default_kept"].flatten())


def _received(attention: Tensor, n: int, order: Tensor | None) -> Tensor:
    """Column score of a map `(H, Q, Q)`: means of columns without that of CLS, or sums over merge groups in window order put back in raster order."""
    if order is None:
        return attention.mean((0, 1))[-n:]
    windows = attention.mean(0).sum(0).view(n, -1).mean(1)
    return torch.zeros_like(windows).scatter(0, order, windows)


def _sorted_parts(vector: Vector) -> Tensor:
    """Anchors and buffers of every view in ascending order, view after view."""
    index = vector["anchor_buffer_index"]
    ends = vector["anchor_buffer_offsets"].tolist() if vector.has("anchor_buffer_offsets") else [0, len(index)]
    return torch.cat([index[start:end].sort().values for start, end in itertools.pairwise(ends)])
