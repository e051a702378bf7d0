"""`vtr tune` end to end on a checkpoint with random weights: its files, its plan in other commands, kill and resume, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import vtr
from tests.cli.test_bad_input import refused
from tests.command_line import CliRunner
from tests.embedded import random_checkpoint
from vtr.bench.measure import Row
from vtr.bench.record import KEPT, METHOD
from vtr.cli import app
from vtr.eval.run import results
from vtr.models.loading import load_model
from vtr.tune import measure
from vtr.types.naming import FULL

ROOT = Path(__file__).parents[2]


SPACE = ("--methods", "uniform,fastv", "--keep", "300,20", "--set", "fastv.layer=[1]")


def arguments(folder, *more, target="<=60 points"):
    common = ("--limit", 4, "--batch-size", 8, "--threads", 1, "--quiet", "--out", folder)
    return [str(one) for one in ("tune", "--model", random_checkpoint(), "--target", target, *common, *more)]


def tune(folder, *more, code=0, **options):
    result = CliRunner().invoke(app, arguments(folder, *more, **options))
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split())


def made_up(model, pool, methods, keep, new_tokens, repeats, floors=True, until=0):
    """What `run_cell` returns, without a run: a tenth faster for each 64 tokens less."""
    lengths = [None, *(method.keep for method in methods), *([keep] if floors else [])]
    kinds = [FULL, *(METHOD for _ in methods), *([KEPT] if floors else [])]
    times = [100.0 if length is None else 100 / (1 + 0.1 * (576 - length) / 64) for length in lengths]
    runs = [[{"total_ms": {str(new_tokens[0]): ms * (1 + 0.01 * (i % 3))}} for i in range(repeats)] for ms in times]
    return [Row(kind, kind, runs=own) for kind, own in zip(kinds, runs, strict=True)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder after a tuning, and what that printed."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "run_cell", made_up)
        return folder, tune(folder, *SPACE)


def test_it_leaves_tables_a_picture_and_a_plan(tuned):
    folder, said = tuned
    content = json.loads((folder / "tune.json").read_text())
    assert {one["label"] for one in content["points"]} <= {
        f"{name} keep={keep}{layer}" for name, layer in (("uniform", ""), ("fastv", " layer=1")) for keep in (300, 20)
    }
    label = content["chosen"]["label"]
    assert f"{label} is chosen for the target, at most 60 points" in said and "held-out samples" in said
    assert content["verdict"] in ("met", "not shown", "missed") and content["held_out"][0]["samples"] == 10
    assert all(one["speed"]["low"] <= one["speed"]["value"] <= one["speed"]["high"] for one in content["points"])
    assert label in (folder / "tune.md").read_text() and (folder / "tune.csv").read_text().count("\n") == 1 + len(content["points"])
    with Image.open(folder / "tune.png") as picture:
        assert picture.width > 500
    assert results.read_folder(folder / "cells")[1] == []


def test_its_plan_is_taken_by_vtr_plan_run_and_eval(tuned, tmp_path):
    folder, _ = tuned
    content = json.loads((folder / "plan.json").read_text())
    chosen = json.loads((folder / "tune.json").read_text())["chosen"]
    model, _ = load_model(str(random_checkpoint()), "cpu")
    assert vtr.plan(model, content).to_dict()["methods"] == content["methods"]
    assert (content["methods"][0]["name"], content["methods"][0]["keep"]) == (chosen["name"], chosen["keep"])

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    common = ("--model", random_checkpoint(), "--plan", folder / "plan.json", "--max-new-tokens", 2, "--quiet")
    asked = ("run", *common, "--image", tmp_path / "image.png", "--question", "what?", "--out", tmp_path / "run", "--json")
    shown = CliRunner().invoke(app, list(map(str, asked)))
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["reduced"]["retained"] == [chosen["keep"]]
    shown = CliRunner().invoke(app, list(map(str, ("eval", *common, "--limit", 1, "--out", tmp_path / "eval"))))
    assert shown.exit_code == 0, shown.output
    (cell,) = results.read_folder(tmp_path / "eval")[0]
    assert cell["fingerprint"]["method"] == chosen["name"] and cell["fingerprint"]["settings"]["keep"] == chosen["keep"]


def test_a_second_run_measures_nothing_again(tuned, monkeypatch):
    folder, said = tuned
    monkeypatch.setattr(measure, "run_cell", None)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert tune(folder, *SPACE) == said
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")} == before


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on(tmp_path, how):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = arguments(tmp_path, "--methods", "uniform", "--keep", "300,200,100,20")
    process = subprocess.Popen(
        [sys.executable, "-m", "vtr", *command], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    end = time.monotonic() + 300
    while len(list(tmp_path.glob("cells/*.json"))) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(how)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == (130 if how == signal.SIGINT else -how) and "Traceback" not in said
    assert not (tmp_path / "tune.json").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*.json")}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((tmp_path / "tune.json").read_text())["finished"]


@pytest.mark.slow
def test_a_machine_is_timed(tmp_path):
    tune(tmp_path, "--methods", "uniform", "--keep", "20", "--new-tokens", 2)
    for path in (tmp_path / "speeds").iterdir():
        content = json.loads(path.read_text())
        assert len(content["ratios"]) in (measure.ROUNDS, measure.FINAL_ROUNDS) and min(content["ratios"]) > 0


def test_a_time_limit_leaves_what_there_is(tmp_path):
    said = tune(tmp_path, "--methods", "uniform", "--keep", 300, "--minutes", 1e-9, code=1)
    assert "nothing was measured to the end; give it more time" in said and "not compared: uniform" in said and "full:" not in said
    assert not (tmp_path / "plan.json").exists()
    assert json.loads((tmp_path / "tune.json").read_text())["finished"] is False


def test_a_speed_that_none_can_have_is_refused_with_the_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "run_cell", made_up)
    message = "--target: 50x is out of reach: the fastest candidate, uniform keep=20, is 1.87x"
    said = refused(2, message, *arguments(tmp_path, "--methods", "uniform", "--keep", "300,20", target="50x"))
    assert "the kept floor with 20 tokens, the limit of methods behind the tower, is 1.87x" in said


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("unknown method 'fast-v'; did you mean 'fastv'", ("--methods", "fast-v")),
        ("--methods: full is what losses are measured against", ("--methods", "full,fastv")),
        ("unknown task 'shape'; did you mean 'shapes'", ("--methods", "fastv", "--tasks", "shape")),
        ("fastv: unknown setting 'layr'; did you mean 'layer'", ("--methods", "fastv", "--set", "fastv.layr=2")),
        ("--set: 'dart' is not among the methods that are searched (fastv)", ("--methods", "fastv", "--set", "dart.layer=2")),
        ("fastv: keep=900 is above the 576 visual tokens", ("--methods", "fastv", "--keep", "900")),
        ("dycoke: acts on the frames of videos", ("--methods", "dycoke")),
        ("fastv: layer 9 (the paper's K = 9) is out of range", ("--methods", "fastv", "--set", "fastv.layer=[2,9]")),
        ("--minutes: must be above 0, got 0", ("--methods", "fastv", "--minutes", "0")),
        (
            "even if no answer changes, and 4 samples of each family hold out 10; give --limit",
            ("--methods", "fastv", "--target", "<=1 point"),
        ),
        ("--target: must be a speed factor such as '1.5x'", ("--methods", "fastv", "--target", "fast")),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(message, options, tmp_path):
    refused(2, message, *arguments(tmp_path / "new", *options))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ("not complete JSON", "{"),
        ("has no methods", "[]"),
        ("has no methods", '{"host": "llava"}'),
        ("unknown method 'fast'", '{"methods": [{"name": "fast"}]}'),
    ],
)
def test_a_plan_that_is_none_is_refused(message, content, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(content)
    refused(2, message, "eval", "--model", random_checkpoint(), "--plan", file, "--out", tmp_path / "new")


def test_a_plan_says_everything_itself(tmp_path):
    file, place = tmp_path / "plan.json", ("--model", random_checkpoint(), "--image", "a.png", "--question", "what?")
    file.write_text('{"methods": [{"name": "fastv", "keep": 9}, {"name": "dart", "keep": 5}]}')
    refused(2, "--plan: has the method and all its settings, got --keep beside it", "run", *place, "--plan", file, "--keep", 9)
    refused(2, "--plan: run compares one method with the full model", "run", *place, "--plan", file)
    refused(2, "No such file", "run", *place, "--plan", tmp_path / "none.json")
    refused(2, "run: needs --method or --plan, got neither", "run", *place)
    refused(2, "eval: needs --methods or --plan, got neither", "eval", "--model", random_checkpoint(), "--out", tmp_path)
