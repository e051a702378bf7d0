"""Whether a selection runs as one Triton kernel or as a sequence of torch calls. Both give the same indices.

Known of the kernels: they agree with torch in Triton's interpreter (tests/ops/test_kernels.py) and compile for compute capability 8.0 and 9.0.
They have not run on a GPU yet, so they run only where they are asked for. The rule for them: one that is at least twice as fast as torch on the
device becomes what a GPU takes, any other goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ASKED: ContextVar[bool] = ContextVar("vtr_kernels", default=False)


@contextmanager
def kernels(use: bool) -> Iterator[None]:
    """Asks for kernels (a GPU of compute capability 8.0 or higher, and Triton), or for plain torch, for a block and this thread."""
    token = _ASKED.set(use)
    try:
        yield
    finally:
        _ASKED.reset(token)


def fused() -> bool:
    """The one place that decides; compiled code is torch's own, whose compiler of torch 2.11 cannot read what was asked for."""
    return not torch.compiler.is_compiling() and _ASKED.get()
