"""Tables in Markdown, for pages, model cards and reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Returns a pipe table without a line break at its end; what would be markup in a cell is up to the caller."""
    rows = ["| " + " | ".join(row) + " |" for row in (head, *body)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])
