"""Links and anchors of Markdown pages: what the site turns into its own links, and what the tests follow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

_CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|(?P<tick>`+).+?(?P=tick)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*$", re.MULTILINE)


def links(text: str) -> list[str]:
    """Returns the targets of all links and pictures of a page, but those in code."""
    return [match[2] for match in _LINK.finditer(_CODE.sub("", text))]


def with_links(text: str, change: Callable[[str], str]) -> str:
    """Returns a page with another target for every link and picture outside code."""
    return "".join(
        part if code else _LINK.sub(lambda match: f"{match[1]}{change(match[2])}{match[3]}", part) for code, part in _parts(text)
    )


def anchors(text: str) -> set[str]:
    """Returns what `#...` can name on a page: its headings as GitHub and the site write them."""
    fenced = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in _HEADING.findall(fenced.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        copies = (f"{slug}-{number}" for number in range(1, len(found) + 1))
        found.add(slug if slug not in found else next(copy for copy in copies if copy not in found))
    return found


def is_local(target: str) -> bool:
    """Tells whether a link stays in the repository."""
    return not re.match(r"[a-z][a-z0-9+.-]*:|//", target)


def resolved(page: str, target: str) -> tuple[str, str]:
    """Returns the file in the repository that a link on a page names, and the anchor on it: `docs/a.md`, `../b.py#x` -> `b.py`, `x`."""
    file, _, anchor = target.partition("#")
    parts: list[str] = []
    for part in (PurePosixPath(page).parent / file).parts if file else PurePosixPath(page).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
    return "/".join(parts), anchor


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """Yields the pieces of a page in order, and whether each is code."""
    end = 0
    for match in _CODE.finditer(text):
        yield False, text[end : match.start()]
        yield True, match[0]
        end = match.end()
    yield False, text[end:]
