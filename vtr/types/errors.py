"""The exceptions of this package. Wrong input is a `ValueError` or a `TypeError`, what cannot be done with a model is a `VtrError`.

Checks of this package raise `WrongValue` and `WrongType`, a `ValueError` and a `TypeError`, so that a command can tell what a user gave from
what a library below, or a bug, raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class VtrError(RuntimeError):
    """A host, backend or checkpoint cannot do what was asked; the message says what can be done instead.

    Args:
        message: who refuses, what, and what to do.
        setting: name of the setting that is to blame, where it is one.
    """

    def __init__(self, message: str = "", *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class MissingPackage(VtrError):
    """A package of one of the extras is not installed."""

    @classmethod
    def of(cls, who: str, package: str, extra: str, instead: str = "") -> MissingPackage:
        """Returns the error with how to install the package, and what works without it where there is such a thing."""
        way_out = f", or {instead}" if instead else ""
        return cls(f"{who} needs {package}, which is not installed; pip install 'visual-token-reduction[{extra}]'{way_out}")


class Refusal(Exception):
    """What was given is wrong; the base of `WrongValue` and `WrongType`. The message says who refuses, the rule, the value, and what to do."""


class WrongValue(Refusal, ValueError):
    """A value of the right type that makes no sense."""


class WrongType(Refusal, TypeError):
    """A value of a wrong type."""


class SettingError(WrongValue):
    """A setting that a model or an image cannot meet. Arguments as for `VtrError`."""

    def __init__(self, message: str = "", *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left: `MemoryError`, or what torch raises.

    torch has a class of its own for accelerators only. Where its CPU or MPS allocator gives up there is a bare `RuntimeError`, which nothing but
    its text tells from others; this is the one place that reads it.
    """
    import torch

    said = str(error).lower()
    bare = type(error) is RuntimeError and any(words in said for words in ("out of memory", "can't allocate memory", "not enough memory"))
    return bare or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextmanager
def as_refusals() -> Iterator[None]:
    """Makes a plain `ValueError` or `TypeError` that leaves the block a `WrongValue` or a `WrongType` with the same message.

    For blocks that do nothing but look at settings: where a method, perhaps of another package, checks its own.
    """
    try:
        yield
    except Refusal:
        raise
    except ValueError as error:
        raise WrongValue(str(error)) from error
    except TypeError as error:
        raise WrongType(str(error)) from error


def setting_of(error: BaseException) -> str | None:
    """Returns the name of the setting that an error blames, None where it blames none."""
    return error.setting if isinstance(error, (VtrError, SettingError)) else None
