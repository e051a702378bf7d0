"""Evenly spaced entries of a row."""

from __future__ import annotations

from torch import Tensor


def evenly_spaced(real: Tensor, keep: Tensor) -> Tensor:
    """Chooses of the n real entries of each row those at `floor((i + 1/2) n / keep)`, i = 0 .. keep - 1.

    Args:
        real: `(..., N)` bool.
        keep: `(...)` int64; above n all are chosen, 0 or less chooses none.

    Returns:
        Mask `(..., N)` bool with `min(keep, n)` True per row. `O(N)`, no host sync.
    """
    count = real.sum(-1, keepdim=True)
    wanted = keep[..., None].minimum(count).clamp_min(0)
    rank = real.cumsum(-1)  # of a real entry among the real ones, counted from 1

    def chosen_below(number: Tensor) -> Tensor:  # how many chosen ranks lie below `number`
        return (2 * wanted * number + count - 1).div(2 * count.clamp_min(1), rounding_mode="floor").clamp_max(wanted)

    return real & (chosen_below(rank) > chosen_below(rank - 1))
