"""`vtr calibrate shortv`: ranks layers on a checkpoint and writes a list that the method takes."""

import re

import pytest
import yaml

import vtr
from tests.command_line import CliRunner
from tests.embedded import random_checkpoint
from vtr.cli import app


def calibrate(*arguments):
    return CliRunner().invoke(app, ["calibrate", "shortv", "--model", str(random_checkpoint()), *map(str, arguments)])


def test_the_list_is_what_the_method_takes(tmp_path):
    file = tmp_path / "layers.yaml"
    result = calibrate("--out", file, "--samples", 2, "--share", 1.0, "--quiet")
    assert result.exit_code == 0, result.output
    content = yaml.safe_load(file.read_text())
    contribution = [content["contribution"][layer] for layer in content["layers"]]
    assert content["layers"][0] == 2 and contribution[0] == 0  # nothing of the last layer's visual rows reaches the answer
    assert sorted(content["layers"]) == [0, 1, 2] and contribution == sorted(contribution) and contribution[-1] > 0
    assert vtr.create_method("shortv", layers=str(file), first=1).frozen_layers(None) == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--samples", 0), "--samples: must be from 1 to 2500, got 0"), (("--share", 0), r"--share: must be in \(0, 1\], got 0")],
)
def test_bad_numbers_are_refused(arguments, message, tmp_path):
    result = calibrate("--out", tmp_path / "layers.yaml", *arguments)
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())
    assert re.search(message, result.output)
