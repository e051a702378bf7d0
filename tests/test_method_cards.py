"""The card of every method has the form that CONTRIBUTING.md promises: the same headings in the same order."""

from pathlib import Path

import pytest

from vtr.registry import list_methods

CARDS = Path(__file__).parents[1] / "docs" / "methods"
HEADINGS = ["What it does", "Settings", "Cost", "Departures from paper and code", "Published numbers", "Measured here"]


def test_every_method_of_the_toolkit_has_a_card():
    ours = {path.stem for path in (CARDS.parents[1] / "vtr" / "methods").glob("[!_]*.py")}
    assert ours <= set(list_methods())
    assert {path.stem for path in CARDS.glob("*.md")} == ours, "docs/methods has a page for every method, and no other"


@pytest.mark.parametrize("card", sorted(CARDS.glob("*.md")), ids=lambda path: path.stem)
def test_a_card_has_the_common_form(card):
    lines = card.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# {card.stem}: ")
    assert [line.removeprefix("## ") for line in lines if line.startswith("##")] == HEADINGS
    sections = "\n".join(lines).split("\n## ")
    assert f"vtr/methods/{card.stem}.py" in sections[0], "the source is named in front of the first heading"
    assert all(section.partition("\n")[2].strip() for section in sections), "no section is empty"
    assert all(sections[0].count(f"**{when} it when** ") == 1 for when in ("Use", "Avoid")), (
        "between <!-- use:begin --> and <!-- use:end -->"
    )
