"""The site: every page is in its navigation, it builds without a warning, and it loads nothing from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import PAGES, ROOT

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")

from scripts.pages import site


@pytest.mark.parametrize(
    "file", ["docs/faq.md", "docs/methods/fastv.md", "CONTRIBUTING.md", "vtr/methods/fastv.py", "models/tiny-llava/README.md"]
)
def test_a_file_has_one_place_and_is_found_from_it(file: str) -> None:
    assert site.origin(site.place(file)) == file
    assert site.place("README.md") == "index.md" and site.place("models/tiny-llava") == site.place("models/tiny-llava/README.md")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"^ +- [^#\n]*?([\w/-]+\.md)$", navigation, re.MULTILINE))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/") and not page.startswith("docs/methods/")}
    assert pages | {"contributing.md", "changelog.md"} == named


def test_a_notebook_is_shown_with_what_it_printed() -> None:
    outputs = [{"text": ["4\n"]}, {"data": {"image/png": "aGk=\n", "text/plain": ["<Image>"]}}]
    cells = [{"cell_type": "markdown", "source": ["# T\n"]}, {"cell_type": "code", "source": ["2 + 2"], "outputs": outputs}]
    page = site.notebook({"cells": cells})
    assert page == "# T\n\n\n```python\n2 + 2\n```\n\n```text\n4\n```\n\n![output](data:image/png;base64,aGk=)"


class Resources(HTMLParser):
    """Collects what a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(given.get("src") or "")
        elif tag == "link":
            self.found.append(given.get("href") or "")
        elif "mermaid" in (given.get("class") or ""):
            self.found.append("https://mermaid, which the theme loads from elsewhere")


def loaded(page: str) -> list[str]:
    """The addresses that are not on the site."""
    parser = Resources()
    parser.feed(page)
    return [address for address in parser.found if re.match(r"(https?:)?//", address)]


def test_what_is_loaded_from_elsewhere_is_found() -> None:
    page = (
        '<a href="https://a.b"></a><script src="x.js"></script><link href="https://fonts.c/d"><img src="//e.f/g.png"><pre class="mermaid">'
    )
    assert len(loaded(page)) == 3


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": ".", "NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES) / 2
    assert not [f"{page.relative_to(tmp_path)}: {address}" for page in pages for address in loaded(page.read_text(encoding="utf-8"))]
    styles = [style.read_text(encoding="utf-8") for style in tmp_path.rglob("*.css")]
    assert not [match for style in styles for match in re.findall(r"url\(['\"]?(?:https?:)?//[^)]*|@import[^;]*", style)]


@pytest.mark.parametrize("drawing", sorted((ROOT / "docs" / "figures").glob("*.mmd")), ids=lambda path: path.stem)
def test_a_drawing_shows_what_its_source_says(drawing: Path) -> None:
    shown = re.sub(r"\s+|&gt;|<[^>]*>", "", drawing.with_suffix(".svg").read_text(encoding="utf-8"))
    for label in re.findall(r'"([^"]+)"', drawing.read_text(encoding="utf-8")):
        assert all(re.sub(r"[\s>]+", "", line) in shown for line in label.split("<br/>")), label
