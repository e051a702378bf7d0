"""`scripts/floors.py` on a checkpoint with random weights, which misses them."""

import pytest
import typer

from scripts.floors import floors
from tests.command_line import CliRunner
from tests.embedded import random_checkpoint


def run(*arguments):
    app = typer.Typer()
    app.command()(floors)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output + repr(result.exception)
    return result.stdout


@pytest.mark.slow
def test_floors_are_written_to_the_card(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# tiny\n")
    options = ("--out", tmp_path / "cells", "--limit", 1, "--seeds", "0", "--card", card)
    shown = run(random_checkpoint(), *options, "--against", random_checkpoint())
    assert "MISSED full: macro accuracy at least 88 %" in shown
    assert "reading at least as good as random" in shown
    once = card.read_text()
    assert "| random 288 |" in once
    run(random_checkpoint(), *options, "--against", random_checkpoint())
    assert card.read_text() == once
