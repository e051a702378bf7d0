"""Whether a selection runs as one Triton kernel or as a sequence of torch calls. Both give the same indices.

Known of the kernels: they agree with torch in Triton's interpreter (tests/ops/test_kernels.py) and compile for compute capability 8.0 and 9.0.
They have not run on a GPU yet. The rule for them: one that is not at least twice as fast as torch on the device goes, with its branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_ASKED: ContextVar[bool | None] = ContextVar("vtr_kernels", default=None)


@contextmanager
def kernels(use: bool) -> Iterator[None]:
    """Forces kernels, or plain torch, for the length of a block and for this thread; what the tests and the benchmark compare them with."""
    token = _ASKED.set(use)
    try:
        yield
    finally:
        _ASKED.reset(token)


def fused(tensor: Tensor) -> bool:
    """The one place that decides: kernels for float tensors on a GPU that Triton compiles for, unless `kernels` says otherwise."""
    asked = _ASKED.get()
    if asked is not None:
        return asked
    return tensor.is_cuda and _compiles(tensor.device.index)


@cache
def _compiles(device: int) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
