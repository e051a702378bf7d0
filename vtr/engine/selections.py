"""What a method answers: checked, counted, and turned into a keep mask with merged values; the same for the tower and the LLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.engine.images import Images
from vtr.engine.tokens import Located, Sequence
from vtr.ops.gather import index_to_mask, take
from vtr.types import Selection, View, VtrError


def check_selection(name: str, selection: Selection, view: View) -> None:
    """Refuses an answer that does not fit its View; values of an index are looked at on the CPU only, where that costs no sync.

    Raises:
        TypeError: not a Selection, or a wrong dtype.
        ValueError: a wrong shape or an index out of range.
    """
    if not isinstance(selection, Selection):
        raise TypeError(
            f"{name}: select must return a vtr.Selection, got {type(selection).__name__}; wrap the keep mask in Selection(keep=...)"
        )
    groups, n = view.real.shape
    keep, index = selection.keep, selection.index
    if keep is not None and (keep.dtype != torch.bool or keep.shape != view.real.shape):
        kind = TypeError if keep.dtype != torch.bool else ValueError
        raise kind(
            f"{name}: keep must be a bool mask {(groups, n)}, got {keep.dtype} {tuple(keep.shape)}; return one entry per token of the view"
        )
    if index is not None:
        if index.dtype != torch.int64 or index.ndim != 2 or len(index) != groups:
            raise ValueError(f"{name}: index must be int64 ({groups}, K), got {index.dtype} {tuple(index.shape)}; return one row per group")
        if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < n:
            raise ValueError(
                f"{name}: index must be 0 to {n - 1}, got {int(index.min())} to {int(index.max())}; it counts tokens of the view"
            )


def chosen_mask(selection: Selection, view: View) -> Tensor:
    """Returns the keep mask `(G, N)` bool of a Selection over the tokens of its View."""
    if selection.keep is not None:
        return selection.keep
    return index_to_mask(selection.index, selection.real, view.real.shape[1])  # type: ignore[arg-type]


def limited(chosen: Tensor, keep: Tensor, item: Any, asked: list[int], checks: list[tuple[Any, Tensor, list[int]]]) -> Tensor:
    """Returns a keep mask without what a method kept above its budget, so that nothing else has to make room for it.

    Counts are left on the device, as `(item, kept (G,), asked)` in `checks`; a report compares them and refuses, see `check_counts`.

    Args:
        chosen: `(G, N)` bool, of tokens that are real.
        keep: `(G,)` int64, tokens asked for; `asked`: the same on the host.
        item: the plan's step, for the message.
        checks: gets one entry.
    """
    rank = chosen.cumsum(1)
    checks.append((item, rank[:, -1], asked))
    return chosen & (rank <= keep[:, None])


def check_counts(checks: list[tuple[Any, Tensor, list[int]]]) -> None:
    """Compares what every step kept with what it was asked for; waits for the device.

    Raises:
        VtrError: a method kept another number.
    """
    for item, kept, asked in checks:
        got = kept.tolist()
        wrong = [(g, k) for g, k in zip(got, asked, strict=True) if g != k]
        if wrong:
            at = f"{item.step.stage} layer {item.step.layer}" if item.step.stage in ("tower", "prefill") else f"the {item.step.stage}"
            raise VtrError(
                f"{item.name}: select kept {wrong[0][0]} visual tokens of an image at {at}, keep was {wrong[0][1]}; return exactly view.keep True "
                "entries per row of the view, and nothing that was measured with this method counts"
            )


def settle(
    selection: Selection, chosen: Tensor, view: View, located: Located, images: Images, hidden: Tensor, sequence: Sequence
) -> tuple[Tensor, Tensor]:
    """Turns a Selection into a keep mask over the sequence, with merged values written and sizes and assignment updated.

    `chosen (G, N)` bool is its keep mask, from `chosen_mask`.

    Returns:
        `hidden (R, S, D)` and `keep (R, S)` bool, True for everything that is not a visual token of these groups.
    """
    rows, length = sequence.column.shape
    size = rows * length
    n = view.real.shape[1]
    target = torch.where(located.present, located.flat, size)
    keep = torch.ones(size + 1, dtype=torch.bool, device=hidden.device)
    keep = keep.scatter_(0, target.flatten(), (chosen & located.present).flatten())[:-1].view(rows, length)
    if selection.tokens is not None or selection.order == "given":
        values, spot = _new_values(selection, view, located, sequence, size)
        padded = torch.cat([hidden.flatten(0, 1), hidden.new_zeros(1, hidden.shape[-1])])
        hidden = padded.index_copy(0, spot.flatten(), values.to(hidden.dtype).flatten(0, 1))[:-1].view_as(hidden)
    if selection.assign is not None:
        _reassign(selection.assign, chosen, located, view.real, images)
    elif images.assign is not None:
        own = torch.arange(n, device=hidden.device).expand_as(located.gid)
        _reassign(torch.where(chosen, own, -1), chosen, located, view.real, images)
    return hidden, keep


def _new_values(selection: Selection, view: View, located: Located, sequence: Sequence, size: int) -> tuple[Tensor, Tensor]:
    """Values and the flat positions they go to (`size` = nowhere) for merged tokens or a given order."""
    if selection.index is None:
        assert selection.keep is not None and selection.tokens is not None
        return selection.tokens, torch.where(selection.keep & located.present, located.flat, size)
    index = selection.index
    real = torch.ones_like(index, dtype=torch.bool) if selection.real is None else selection.real
    values = selection.tokens if selection.tokens is not None else take(view.tokens, index)
    spot = torch.where(real, located.flat.gather(1, index), size)
    if selection.order == "given":
        places = spot.sort(dim=1).values  # the j-th token of the given order goes to the j-th place
        column = sequence.column.flatten()
        moved = torch.cat([column, column[:1]])
        moved[places.flatten()] = torch.where(real, column[spot.clamp_max(size - 1)], column[0]).flatten()
        sequence.column = moved[:-1].view_as(sequence.column)
        spot = places
    return values, spot


def _reassign(assign: Tensor, chosen: Tensor, located: Located, real: Tensor, images: Images) -> None:
    """Moves sizes and the assignment of original tokens to the pivots; flat scatter over global ids."""
    total = len(images.alive)
    gid = torch.where(real, located.gid, total)
    pivot = torch.where(real & (assign >= 0), located.gid.gather(1, assign.clamp_min(0)), total)
    own = torch.arange(total + 1, device=gid.device)
    if images.assign is None:
        images.assign = torch.where(images.alive, own[:-1], -1)
    step = own.scatter(0, gid.flatten(), torch.where(pivot < total, pivot, -1).flatten())
    images.assign = torch.where(images.assign >= 0, step[images.assign.clamp_min(0)], -1)
    sizes = torch.cat([images.sizes, images.sizes.new_zeros(1)])
    moved = sizes.scatter(0, gid.flatten(), 0.0)
    images.sizes = moved.scatter_add(0, pivot.flatten(), torch.where(real, images.sizes[located.gid], 0.0).flatten())[:-1]
