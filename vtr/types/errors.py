"""The exception of this package."""


class VtrError(RuntimeError):
    """A host, backend or checkpoint cannot do what was asked; the message says what can be done instead."""
