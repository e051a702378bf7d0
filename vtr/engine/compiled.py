"""Compiled code that was made before the hooks of a reduction came or went."""

from __future__ import annotations

import sys

import torch


def forget_compiled() -> None:
    """Drops what `torch.compile` made in this process; each function is compiled again at its next call.

    torch does not look whether a module has got or lost hooks since it was compiled (`skip_nnmodule_hook_guards`), so that old code would
    go on with, or without, a reduction. There is no way to drop the code of one module. Does nothing where nothing was compiled.
    """
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and getattr(getattr(frames, "output_codes", None), "seen", True):  # torch 2.11 to 2.15; others: always
        torch.compiler.reset()
