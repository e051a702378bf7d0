"""What the pages of methods show of our own measurements."""

import pytest
from PIL import Image

from scripts.pages.methods import SIDE, draw_pictures, measured_table, update_page
from tests.embedded import random_checkpoint
from tests.eval.report.made import table
from vtr.eval.examples import load_examples
from vtr.eval.measured import measured_in
from vtr.eval.report.build import sections_of
from vtr.models.loading import load_model

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


@pytest.fixture
def sections():
    return sections_of(table())


def test_a_method_stands_beside_random_and_full_at_its_budget(sections):
    (section,) = sections
    measured = measured_in(section)
    lines = measured_table("fastv", measured).splitlines()
    rows = sorted((row for row in section.rows if row.method == "fastv"), key=lambda row: -row.keep)  # the largest budget first
    assert len(lines) == 2 + len(rows) and lines[0].startswith("| measured on | budget |")
    for line, row in zip(lines[2:], rows, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [section.title, row.budget]
        others = (row, section.random(row), section.partner(row, "pool"), section.full(row))
        shown = [f"{100 * one.macro.value:.1f}" for one in others]
        assert all(cell.startswith(value) for cell, value in zip(cells[2:6], shown, strict=True))
        assert cells[-1] == "existence, text"  # 30 % right where random and pool have 60
    assert measured_table("nothing of that name", measured) == ""


def test_only_what_is_between_the_marks_changes(tmp_path, sections):
    page = tmp_path / "methods" / "fastv.md"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    picture = tmp_path / "figures" / "fastv.png"
    picture.parent.mkdir()
    Image.new("RGB", (2, 2)).save(picture)
    measured = measured_in(sections[0])
    for _ in range(2):  # again and again
        assert update_page(page, measured, picture, "how many?")
        text = page.read_text()
        assert text.startswith(f"before\n{BEGIN}\n![what fastv retains](../figures/fastv.png)") and text.endswith(f"{END}\nafter\n")
        assert "old" not in text and measured_table("fastv", measured) in text
    page.write_text("no marks")
    assert not update_page(page, measured, None, "") and page.read_text() == "no marks"


def test_pictures_are_small_and_of_methods_that_work(tmp_path):
    model, processor = load_model(str(random_checkpoint()), device="cpu")
    written = draw_pictures(model, processor, load_examples()[0], tmp_path / "pictures", ["fastv", "shortv"])
    assert [path.name for path in written if path.stem == "fastv"] == ["fastv.png"]
    assert Image.open(written[0]).size == (SIDE, SIDE)
