"""The exceptions of this package. Wrong input is a `ValueError` or a `TypeError`, what cannot be done with a model is a `VtrError`."""

from __future__ import annotations


class VtrError(RuntimeError):
    """A host, backend or checkpoint cannot do what was asked; the message says what can be done instead.

    Args:
        message: who refuses, what, and what to do.
        setting: name of the setting that is to blame, where it is one.
    """

    def __init__(self, message: str = "", *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class SettingError(ValueError):
    """A setting that a model or an image cannot meet. Arguments as for `VtrError`."""

    def __init__(self, message: str = "", *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


def setting_of(error: BaseException) -> str | None:
    """Returns the name of the setting that an error blames, None where it blames none."""
    return error.setting if isinstance(error, (VtrError, SettingError)) else None
