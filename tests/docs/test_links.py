"""Every link of README, docs and cards leads somewhere, on GitHub and, by the same rules, on the site."""

from pathlib import Path

import pytest

from scripts.pages.links import anchors, is_local, links, resolved, with_links
from tests.docs.pages import PAGES, ROOT, text_of


def dead(page: str) -> list[str]:
    """The links of a page that name no file, or no heading of a page."""
    found = []
    for target in filter(is_local, links(text_of(page))):
        file, anchor = resolved(page, target)
        if not (ROOT / file).exists() or (anchor and anchor not in anchors(text_of(file))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    assert not dead(page)


def test_a_dead_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "b.md").write_text("# One thing, `two`\n# One thing, `two`\n")
    (tmp_path / "docs" / "a.md").write_text(
        "# A\n[1](../b.md#one-thing-two) [2](../b.md#one-thing-two-1) [3](#a) [4](https://x.y/z) `[5](no.md)`\n"
        "```\n[6](no.md)\n```\n![7](no.png) [8](../b.md#two) [9](#b)\n"
    )
    monkeypatch.setattr("tests.docs.test_links.ROOT", tmp_path)
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    assert dead("docs/a.md") == ["no.png", "../b.md#two", "#b"]


def test_links_are_changed_outside_code_alone() -> None:
    text = "[a](x.md) `[b](x.md)`\n```\n[c](x.md)\n```\n![d](x.png)"
    assert with_links(text, str.upper) == "[a](X.MD) `[b](x.md)`\n```\n[c](x.md)\n```\n![d](X.PNG)"
