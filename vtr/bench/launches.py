"""Counts what a device would be asked to do: calls of torch's operators that compute something, and reads that would wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")
_NOTHING = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "alias", "scalar_tensor", "promote_types")
"""Beginnings of names of operators that start no kernel: memory, other views of it, and numbers of the host."""


class Launches(TorchDispatchMode):
    """Counts operators while it is entered: `with Launches() as seen: run()`, then `seen.count`, `seen.waits` and `seen.by_name`.

    Views and empty memory start nothing and are not counted. An operator counts once however many kernels its implementation has (a sort of long
    rows has several), so that counts are the same on all devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.__name__.partition(".")[0]
        if not operator.is_view and not name.startswith(_NOTHING):
            self.by_name[name] += 1
        return operator(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        """Returns the operators that start a kernel."""
        return sum(self.by_name.values()) - self.waits

    @property
    def waits(self) -> int:
        """Returns the operators whose result the host waits for."""
        return sum(number for name, number in self.by_name.items() if name in _WAITS)


@torch.no_grad()
def launches(run: Callable[[], Any]) -> tuple[int, int]:
    """Returns how many operators one `run()` launches, and how many times the host would wait for a device."""
    with Launches() as seen:
        run()
    return seen.count, seen.waits
