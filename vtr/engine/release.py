"""Checks reduced models once per process on a release of transformers that is newer than the tested one."""

from __future__ import annotations

import warnings
from importlib import import_module

from vtr.types import VtrError
from vtr.versions import newer_than_tested, tested_release

SELF_CHECK = "vtr.selfcheck"
"""Found by name, as methods and hosts are: it reduces models itself, so it stands above this room."""
_checked: list[str] = []


def check_release() -> None:
    """Warns and runs the self-check at the first reduction of a process, where transformers is newer than tested; else does nothing.

    Raises:
        VtrError: small random models show that reduced models compute something else with this release.
    """
    if _checked:
        return
    _checked.append("running")  # the self-check reduces models itself
    newer = newer_than_tested()
    if newer is None:
        return
    warnings.warn(f"vtr: {newer}; a few small random models are checked now, `vtr doctor` says more", stacklevel=2)
    self_check = import_module(SELF_CHECK).self_check
    failed = [check.name for check in self_check(quick=True) if not check.passed]
    if failed:
        _checked.clear()
        raise VtrError(
            f"vtr.apply: {newer}, and with it reduced models compute something else than they must ({', '.join(failed)}); install "
            f"transformers=={tested_release('transformers')}, and see `vtr doctor`"
        )
