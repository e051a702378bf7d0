"""Counter-based randomness: the same on every device, in every batch and on every row."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = -7046029254386353131


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 tensors (wrapping arithmetic)."""
    x = x + _STEP
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def random_key(seed: int, checksum: Tensor, counter: Tensor) -> Tensor:
    """Integer random numbers of (seed, image, patch).

    Args:
        seed: any int.
        checksum: `(G,)` int64 of each image's pixel values.
        counter: `(G, N)` int64, e.g. original patch ids.

    Returns:
        `(G, N)` int64, uniform in [0, 2^53), so that float64 holds it exactly.
    """
    start = mix(checksum + mix(torch.tensor(seed, dtype=torch.int64, device=checksum.device)))
    return _shift(mix(start[:, None] + mix(counter)), 11)


def checksum(values: Tensor) -> Tensor:
    """Order-sensitive int64 checksum of each row of `values (V, ...)`, from the float32 bit patterns; the same on CPU and CUDA."""
    bits = values.detach().flatten(1).float().contiguous().view(torch.int32).to(torch.int64)
    weight = mix(torch.arange(bits.shape[1], device=bits.device)) | 1
    return mix((bits * weight).sum(1))
