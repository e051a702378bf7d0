"""Hooks of mkdocs.yml: the site shows files of the whole repository, and the links between them stay relative ones that GitHub follows, too.

A page under docs/ may link to `../vtr/methods/fastv.py` or `../models/tiny-llava`. Every file linked so becomes a page below `source/`: Markdown as
it is, notebooks with their outputs, everything else as code. So the site needs no address of a repository and shows the version it was built from.
"""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.pages.links import is_local, links, resolved, with_links

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Files of the repository that have a page of their own outside `source/`; every file of docs/ has one, too."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".cff": "yaml", ".sh": "bash", ".toml": "toml"}


def place(file: str) -> str:
    """Returns the page, or the file, of the site that shows a file of the repository."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    if (ROOT / file).is_dir():
        file = f"{file}/README.md"
    return PAGES.get(file) or f"source/{file if file.endswith('.md') else file + '.md'}"


def origin(page: str) -> str:
    """Returns the file of the repository that a page of the site was made from."""
    own = {to: file for file, to in PAGES.items() if file != "README.md"}
    if not page.startswith("source/"):
        return own.get(page) or f"docs/{page}"
    file = page.removeprefix("source/")
    return file if (ROOT / file).is_file() else file.removesuffix(".md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the card of every method in the navigation."""
    cards = sorted(path.stem for path in (ROOT / "docs" / "methods").glob("*.md"))
    for entry in config.nav or ():
        if "Methods" in entry:
            entry["Methods"] += [{name: f"methods/{name}.md"} for name in cards]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every file outside docs/ that a page links to, and for those that such pages link to."""
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    waiting += [(PAGES[name], "") for name in ("CONTRIBUTING.md", "CHANGELOG.md")]
    while waiting:
        page, content = waiting.pop()
        if files.get_file_from_path(page) is None:
            content = shown(origin(page))
            files.append(File.generated(config, page, content=content))
        for target in filter(is_local, links(content)):
            to = place(resolved(origin(page), target)[0])
            if files.get_file_from_path(to) is None and to.endswith(".md") and (ROOT / origin(to)).is_file():  # else mkdocs says it
                waiting.append((to, ""))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links of the repository links of the site."""
    own = page.file.src_uri

    def change(target: str) -> str:
        if not is_local(target) or target.startswith("#"):
            return target
        file, anchor = resolved(origin(own), target)
        return posixpath.relpath(place(file), posixpath.dirname(own) or ".") + (f"#{anchor}" if anchor else "")

    return with_links(markdown, change)


def shown(file: str) -> str:
    """Returns a file of the repository as a page in Markdown."""
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return notebook(json.loads(text))
    return f"# {path.name}\n\n`{file}`\n\n{fenced(text, LANGUAGES.get(path.suffix, 'text'))}\n"


def notebook(cells: dict[str, Any]) -> str:
    """Returns a notebook as a page in Markdown: its texts, code, printed outputs and pictures."""
    parts = []
    for cell in cells["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else fenced(source, "python"))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if kind := next((kind for kind in ("image/png", "image/jpeg") if kind in data), None):
                parts.append(f"![output](data:{kind};base64,{''.join(''.join(data[kind]).split())})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(fenced(text, "text"))
    return "\n\n".join(parts)


def fenced(text: str, language: str) -> str:
    """Returns a block of code, in a fence that the text does not hold."""
    fence = "````" if "```" in text else "```"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
