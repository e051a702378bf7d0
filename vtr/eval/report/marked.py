"""Blocks that a command writes into a page between two marks; the rest of the page stays as it is."""

from __future__ import annotations

from vtr.types.errors import WrongValue


def has_block(page: str, name: str) -> bool:
    """Tells whether `page` holds `<!-- NAME:begin -->` or `<!-- NAME:end -->`."""
    return any(mark in page for mark in _marks(name))


def with_block(page: str, name: str, block: str) -> str:
    """Returns `page` with `block` between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

    Raises:
        ValueError: the two marks are not there once each, in that order.
    """
    begin, end = _marks(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.find(begin) > page.find(end):
        raise WrongValue(f"page: it must have {begin} and {end} once each, in that order; put them where the block belongs")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
