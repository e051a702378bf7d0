"""`vtr report`: from a folder of results to Markdown."""

from typer.testing import CliRunner

from tests.embedded import random_checkpoint
from vtr.cli import app


def vtr(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_folder_of_results_becomes_tables_between_the_marks(tmp_path):
    folder, page = tmp_path / "cells", tmp_path / "results.md"
    done = vtr("eval", "--model", random_checkpoint(), "--methods", "full,random", "--keep", 8, "--limit", 1, "--out", folder, "--quiet")
    assert done.exit_code == 0, done.output
    page.write_text("# Results\n\n<!-- tables:begin -->\nold\n<!-- tables:end -->\n\nWords after.\n")
    assert vtr("report", folder, "--out", page).exit_code == 0
    text = page.read_text()
    assert text.startswith("# Results") and text.endswith("Words after.\n") and "old" not in text
    assert "### keep 8" in text and "| full |" in text


def test_a_folder_without_results_is_refused(tmp_path):
    for folder, message in ((tmp_path, "no results in"), (tmp_path / "nowhere", "no folder")):
        result = vtr("report", folder)
        assert result.exit_code == 2 and message in result.output
