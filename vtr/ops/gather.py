"""The one primitive of all removal, compaction, and gathering along a per-row index."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.ops.blocks import suits_cpu


def compaction(keep: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Where the survivors of a keep mask are, in original order, right aligned.

    Args:
        keep: `(B, S)` bool, True stays.
        width: `keep.sum(1).max()` when the caller knows it; None costs the one host sync of a removal.

    Returns:
        `index (B, width)` int64 into S and `real (B, width)` bool. Rows that keep fewer are filled on the left with indices of removed
        tokens, so that every gathered value is finite and padding is always left padding.
    """
    if width is None:
        width = int(keep.sum(1).max())
    index = keep.view(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
    return index, keep.gather(1, index)


def take(tensor: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gathers `tensor` along `dim` with one index row per batch row.

    Args:
        tensor: any shape; dimension `dim - 1` is the batch, of size `B` or 1.
        index: `(B, K)` int64.
        dim: the dimension indexed; negative counts from the end.

    Returns:
        `tensor` with `dim` of size K and the batch dimension of size B.
    """
    dim = dim % tensor.ndim
    if dim == 1 and tensor.ndim > 2 and len(tensor) == len(index) and tensor.is_contiguous():  # whole rows, which is much faster
        start = torch.arange(0, tensor.shape[0] * tensor.shape[1], max(tensor.shape[1], 1), device=index.device)
        return tensor.flatten(0, 1).index_select(0, (index + start[:, None]).flatten()).view(*index.shape, *tensor.shape[2:])
    shape = list(tensor.shape)
    shape[dim - 1] = index.shape[0]
    view = [1] * tensor.ndim
    view[dim - 1], view[dim] = index.shape
    source = tensor.expand(shape)
    shape[dim] = index.shape[1]
    return source.gather(dim, index.view(view).expand(shape))


def left_align(present: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Index of the present entries first, in order: `index (B, width)`, `real (B, width)`. The mirror image of `compaction`."""
    index = present.view(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return index, present.gather(1, index)


def index_to_mask(index: Tensor, real: Tensor | None, n: int) -> Tensor:
    """Keep mask `(B, n)` bool of an index `(B, K)`, whose entries count only where `real (B, K)`."""
    mask = torch.zeros(index.shape[0], n + 1, dtype=torch.bool, device=index.device)
    where = index if real is None else torch.where(real, index, n)
    return mask.scatter_(1, where, True)[:, :n]


def group_sums(values: Tensor, group: Tensor, groups: int, finite: bool = True) -> tuple[Tensor, Tensor]:
    """Sums the rows of every group, in a fixed order on every device.

    Args:
        values: `(B, N, D)` float.
        group: `(B, N)` int64; rows with another number than `0 .. groups - 1` count nowhere.
        groups: how many there are.
        finite: False where a row that counts nowhere may be NaN.

    Returns:
        Sums `(B, groups, D)` and how many rows each has, `(B, groups)` int64.
    """
    if suits_cpu(values):
        first = torch.arange(len(group))[:, None] * (groups + 1)
        to = (group.clamp_max(groups) % (groups + 1) + first).flatten()  # what counts nowhere goes into one group more
        total = values.new_zeros(len(group) * (groups + 1), values.shape[2]).index_add_(0, to, values.flatten(0, 1))
        number = torch.bincount(to, minlength=len(total))
        return total.unflatten(0, (len(group), groups + 1))[:, :groups], number.unflatten(0, (len(group), groups + 1))[:, :groups]
    member = group[:, None] == torch.arange(groups, device=group.device)[:, None]  # (B, groups, N)
    counted = values if finite else values.masked_fill(~member.any(1)[..., None], 0)
    return member.to(values.dtype) @ counted, member.sum(2)
