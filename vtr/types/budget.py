"""How many visual tokens a user wants to keep."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vtr.types.errors import WrongType, WrongValue
from vtr.types.settings import is_integer, is_number, plain


@dataclass(frozen=True)
class Budget:
    """What a user asks for, per image over all its crops: exactly one of the three.

    Args:
        keep: visual tokens left after the last removal, at least 1.
        keep_ratio: share of the image's original visual tokens (newlines excluded) left after the last removal, in (0, 1].
        average_keep: mean over the LLM's layers of the visual tokens of a layer.

    Raises:
        ValueError: none or several given, or out of range.
        TypeError: not a number.
    """

    keep: int | None = None
    keep_ratio: float | None = None
    average_keep: float | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, plain(getattr(self, one.name)))
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            shown = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise WrongValue(f"Budget: give exactly one of keep, keep_ratio, average_keep, got {shown}")
        name, value = next(iter(given.items()))
        if not (is_integer(value) if name == "keep" else is_number(value)):
            kind = "an integer" if name == "keep" else "a number"
            raise WrongType(f"Budget: {name} must be {kind}, got {value!r}")
        if name == "keep" and value < 1:
            raise WrongValue(f"Budget: keep must be at least 1, got {value}; method 'none' keeps no visual token")
        if name == "keep_ratio" and not 0 < value <= 1:
            raise WrongValue(f"Budget: keep_ratio must be in (0, 1], got {value}; 0.25 keeps a quarter")
        if name == "average_keep" and not value > 0:
            raise WrongValue(f"Budget: average_keep must be above 0, got {value}")

    def resolve(self, n: int) -> int:
        """Visual tokens to keep of an image that has `n`; half to even, between 1 and `n`. `average_keep` is solved by the plan."""
        if self.average_keep is not None:
            raise WrongValue("Budget: average_keep depends on the layers of the plan; it cannot be resolved from a count alone")
        wanted = self.keep if self.keep is not None else round((self.keep_ratio or 0) * n)
        return min(max(wanted, 1), n)
