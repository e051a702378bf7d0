"""Writes a block into a page, which gets marks at its end where it has none."""

from __future__ import annotations

from pathlib import Path

from vtr.eval.report.marked import has_block, with_block
from vtr.files import write_atomic


def write_block(page: Path, name: str, block: str) -> None:
    """Writes `block` between the marks `NAME:begin` and `NAME:end`; a page that does not exist is made."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if not has_block(text, name):
        text = f"{text}<!-- {name}:begin -->\n<!-- {name}:end -->\n"
    write_atomic(page, with_block(text, name, block))
