"""The vision tower runs once per batch of images, not once per cell, for methods that leave the tower alone.

Most of a cell's time on a CPU is the tower, and methods at the boundary or in the LLM all see the same features. Answers stay the same bit for
bit; latencies of such cells mean nothing, so this has to be asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._protocol import host_of

MOST_BYTES = 4 * 2**30


class TowerCache:
    """Outputs of a model's tower by the content of its pixels.

    Args:
        model: whose tower.
        most_bytes: memory for outputs; when it is full, further batches run through the tower again.
    """

    def __init__(self, model: Any, most_bytes: int = MOST_BYTES) -> None:
        self.tower = host_of(model).tower.module
        self.most_bytes = most_bytes
        self.runs = 0
        self._outputs: dict[str, Any] = {}
        self._bytes = 0

    @contextmanager
    def used_by(self, reduction: Any) -> Iterator[bool]:
        """Inside the block the tower answers from memory where it can; gives False and changes nothing when the reduction needs the tower.

        Args:
            reduction: what is installed on the model, None for nothing.
        """
        if reduction is not None and reduction.plan.uses_tower:
            yield False
            return
        own = self.tower.__dict__.get("forward")
        run = self.tower.forward

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if len(tensors) != 1:
                return run(*args, **kwargs)
            key = _key(tensors[0], repr([v for v in (*args, *sorted(kwargs.items())) if not isinstance(v, Tensor)]))
            if key not in self._outputs:
                self.runs += 1
                output = run(*args, **kwargs)
                size = _size(output)
                if self._bytes + size > self.most_bytes:
                    return output
                self._outputs[key] = output
                self._bytes += size
            return self._outputs[key]

        self.tower.forward = forward
        try:
            yield True
        finally:
            del self.tower.__dict__["forward"]
            if own is not None:
                self.tower.forward = own


def _key(pixels: Tensor, rest: str) -> str:
    content = hashlib.sha256(pixels.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    content.update(f"{tuple(pixels.shape)} {pixels.dtype} {rest}".encode())
    return content.hexdigest()


def _size(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else ()
    return sum(_size(value) for value in values)
