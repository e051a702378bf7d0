"""Expedit's tau: measured by a rule on an encoder, written where the method reads it."""

import pytest
import torch
import yaml
from typer.testing import CliRunner

import vtr
from tests.dense_models import images, model_of
from tests.embedded import random_checkpoint
from tests.tiny_models import snapshot
from vtr.calibrate.expedit import measure_tau
from vtr.cli import app
from vtr.methods.expedit import read_tau
from vtr.ops.clusters import MEDIAN_LOGIT, candidate_distances


def test_the_median_candidate_is_at_two():
    model, pixels = model_of("timm"), images(3)
    seen: list[torch.Tensor] = []
    handle = model.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        full = model(pixels)
    handle.remove()
    before = snapshot(model)
    tau = measure_tau(model, [pixels[:2], pixels[2:]], alpha=2, grid=(4, 4), window=3)
    medians = candidate_distances(seen[0][:, 1:], (6, 6), (4, 4), 3).flatten(1).nanmedian(1).values
    assert tau == pytest.approx(MEDIAN_LOGIT / float(medians.median()), rel=1e-4)
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(pixels), full)


def test_images_without_a_difference_are_refused():
    with pytest.raises(ValueError, match="needs images in which tokens differ, got none"):
        measure_tau(model_of("timm"), [])


def test_the_command_writes_what_the_method_reads(tmp_path):
    file = tmp_path / "tau.yaml"
    arguments = ["calibrate", "expedit", "--model", str(random_checkpoint()), "--samples", "2", "--quiet", "--out", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--grid", "4x3"])
    assert result.exit_code == 0, result.output
    found = yaml.safe_load(file.read_text())["settings"]["expedit"]
    assert found["grid"] == [4, 3] and found["tau"] == read_tau(str(file)) > 0
    assert vtr.create_method("expedit", tau=str(file)).tau == str(file)

    file.write_text("hub_id: x\nnotes: a recipe\n")
    assert CliRunner().invoke(app, arguments).exit_code == 0
    content = yaml.safe_load(file.read_text())
    assert content["notes"] == "a recipe" and content["settings"]["expedit"]["grid"] == 0.7 and "model" not in content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples: must be from 1"),
        (["--grid", "4x"], "--grid: must be ROWSxCOLS"),
        (["--window", "4"], "window must be odd"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path):
    result = CliRunner().invoke(
        app, ["calibrate", "expedit", "--model", str(random_checkpoint()), "--out", str(tmp_path / "x.yaml"), *arguments]
    )
    assert result.exit_code == 2 and message in result.output and not list(tmp_path.iterdir())
