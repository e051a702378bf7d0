"""Claims: of all processes that work on one folder, one at a time runs a cell.

A claim is a file with an advisory lock (`flock`). The lock lives in the kernel and goes with its process, however that ends, so a killed owner
leaves a file that the next one simply takes over. On a network file system without locks two processes may run the same cell; its result is
still written whole, once by each.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from vtr.types import VtrError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_locks(who: str) -> None:
    """Checks that this system has the locks that claims are made of.

    Raises:
        VtrError: it has none.
    """
    if fcntl is None:
        raise VtrError(
            f"{who}: needs a POSIX system (Linux, macOS, or WSL under Windows), whose file locks say which process runs a cell; got "
            f"{sys.platform}; use one of those; vtr run, vtr demo and vtr.reduced take no locks"
        )


class Claim:
    """The right to run the cell whose result belongs at `target`; get it with `take`."""

    def __init__(self, target: Path, handle: int) -> None:
        self.target = target
        self._handle: int | None = handle

    @classmethod
    def take(cls, target: Path) -> Claim | None:
        """Returns the claim, or None while another process (or another claim of this one) has it.

        Raises:
            VtrError: this system has no file locks.
        """
        check_locks("claims")
        path = claim_path(target)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    claim = cls(target, handle)
                    claim._clean()
                    return claim
            os.close(handle)  # its owner released and removed it in between: the lock is on a file that is gone

    def release(self) -> None:
        """Gives the claim up; a second call does nothing."""
        if self._handle is not None:
            with contextlib.suppress(FileNotFoundError):
                claim_path(self.target).unlink()
            os.close(self._handle)
            self._handle = None

    def _clean(self) -> None:
        """Removes what a killed owner left of a half-written result."""
        for path in self.target.parent.glob(f".{self.target.name}.*.tmp"):
            path.unlink(missing_ok=True)


def claim_path(target: Path) -> Path:
    """Returns the file that is locked for the result at `target`."""
    return target.with_name(f".{target.name}.claim")
