"""A report as text in one of four formats, and its plots as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vtr.eval.report.document import Document
from vtr.eval.report.page import html
from vtr.eval.report.writers import comma_separated, latex, markdown
from vtr.eval.run.results import prepare_folder
from vtr.files import write_atomic
from vtr.types.errors import WrongValue
from vtr.types.naming import closest

FORMATS: dict[str, Callable[[Document], str]] = {"md": markdown, "csv": comma_separated, "latex": latex, "html": html}
SUFFIXES = {".md": "md", ".csv": "csv", ".tex": "latex", ".html": "html", ".htm": "html"}


def find_format(name: str | None, target: Path | None) -> str:
    """Returns the format that the user chose, else what the file's name ends with, else Markdown.

    Raises:
        ValueError: no such format.
    """
    if name is None:
        return SUFFIXES.get(target.suffix.lower(), "md") if target else "md"
    if name not in FORMATS:
        raise WrongValue(f"format: must be one of {', '.join(FORMATS)}, got {name!r}{closest(name, list(FORMATS))}")
    return name


def render(document: Document, form: str, pictures: str = "") -> str:
    """Returns the text of a report.

    Args:
        document: what to write.
        form: one of `FORMATS`.
        pictures: folder of the plots as seen from the file, for Markdown; HTML has them inside.
    """
    return markdown(document, pictures) if form == "md" else FORMATS[form](document)


def write_figures(document: Document, folder: Path) -> list[Path]:
    """Writes every plot as PNG and SVG, and returns the files."""
    prepare_folder(folder)
    found = []
    for part in document.parts:
        for figure in part.figures:
            for suffix, content in (("png", figure.png), ("svg", figure.svg)):
                found.append(folder / f"{figure.name}.{suffix}")
                write_atomic(found[-1], content)
    return found
