"""Settings of torch under which checks run, whatever the caller's are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch


@contextmanager
def own_settings() -> Iterator[None]:
    """Runs the block on the CPU in float32, without gradients, autocast and warnings, with random numbers and threads of its own."""
    dtype = torch.get_default_dtype()
    here = torch.get_default_device() == torch.device("cpu")  # then saying so would only slow down every call of torch
    with ExitStack() as stack:
        for manager in (
            nullcontext() if here else torch.device("cpu"),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            stack.enter_context(manager)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # models this small only wait for a second one
        yield
