"""`vtr sweep` from outside: killed and resumed, failing cells, dry runs, two at once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from tests.command_line import CliRunner
from tests.embedded import random_checkpoint
from vtr.cli import app
from vtr.cli.sweep import to_go
from vtr.eval.run import results
from vtr.eval.run.forecast import Estimate, Forecast, Line
from vtr.eval.run.runner import Runner
from vtr.eval.sweep import grid
from vtr.eval.tasks import get_task

ROOT = Path(__file__).parents[2]


def write(folder, keeps="[192, 64]", **more):
    path = folder / "small.yaml"
    lines = {
        "models": random_checkpoint(),
        "methods": "[full, random, uniform, fastv]",
        "plans": "[[{divprune: {keep: 200}}, fastv]]",
        "budgets": f"{{keep: {keeps}}}",
        "settings": "{fastv: {layer: 1}}",
        "equalise": "keep",
        "tasks": "shapes",
        "seeds": "[0, 1]",
        "limit": 1,
        "max_new_tokens": 2,
        "batch_size": 5,
        **more,
    }
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def vtr(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vtr", "sweep", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def without_times(folder):
    """Contents of a result folder but for when and how fast."""
    cells, problems = results.read_folder(folder)
    assert problems == []
    for cell in cells:
        del cell["conditions"]
        cell["summary"] = {k: v for k, v in cell["summary"].items() if not k.endswith("_ms")}
        cell["samples"] = [{k: v for k, v in sample.items() if not k.endswith("_ms")} for sample in cell["samples"]]
    return [json.dumps(cell, sort_keys=True) for cell in cells]


@pytest.mark.slow
def test_killed_three_times_and_resumed_it_is_the_same(tmp_path):
    file, whole, broken = write(tmp_path, keeps=[*range(20, 34)]), tmp_path / "whole", tmp_path / "broken"
    dice, finished = random.Random(0), 0
    for _ in range(3):
        process = start(file, "--out", broken, "--resume")
        end = time.monotonic() + 500
        wanted = finished + dice.randint(3, 8)
        while len(list(broken.glob("*.json"))) < wanted:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.01)
        time.sleep(dice.random() / 10)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        cells, problems = results.read_folder(broken)
        assert problems == [] and len(cells) >= wanted
        finished = len(cells)
    before = {path: path.stat().st_mtime_ns for path in broken.glob("*.json")}
    processes = [start(file, "--out", folder) for folder in (broken, broken, whole)]  # two at once finish the broken one
    for process in processes:
        said = process.communicate(timeout=1000)
        assert process.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished cells are never run twice"
    assert without_times(broken) == without_times(whole)
    assert len(without_times(whole)) == 1 + 14 * 5
    assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in whole.iterdir()), "no claim or temporary file is left"


def test_a_failing_cell_is_told_and_the_others_run(tmp_path, monkeypatch):
    answer = Runner.answer

    def unlucky(self, cell, advance=lambda count: None):
        if cell.name == "uniform":
            raise RuntimeError("CUDA out of memory")
        return answer(self, cell, advance)

    monkeypatch.setattr(Runner, "answer", unlucky)
    file, out = write(tmp_path, keeps=[64], methods="[full, uniform]", plans="[]", settings="{}"), tmp_path / "out"
    first = vtr("sweep", file, "--out", out)
    assert first.exit_code == 1
    assert "1 of 2 cells have a result" in first.stdout
    assert "uniform keep=64" in first.stderr and "CUDA out of memory" in first.stderr and "--resume tries them again" in first.stderr
    monkeypatch.undo()
    assert vtr("sweep", file, "--out", out).exit_code == 1, "a recorded failure is not tried again"
    again = vtr("sweep", file, "--out", out, "--resume")
    assert (again.exit_code, list((out / "failed").iterdir())) == (0, [])
    assert "2 of 2 cells have a result" in again.stdout and "1 run now" in again.stdout


def test_a_dry_run_shows_cells_and_cost_and_writes_nothing(tmp_path):
    file, out = write(tmp_path), tmp_path / "out"
    found = vtr("sweep", file, "--out", out, "--dry-run", "limit=3")
    assert found.exit_code == 0, found.stderr
    assert "divprune+fastv keep=64" in found.stdout.replace("\n", " ") and "TFLOPs to go" in found.stdout
    assert not out.exists()


@pytest.mark.parametrize("known", [True, False])
def test_a_dry_run_does_not_count_what_it_does_not_know(tmp_path, monkeypatch, known):
    remote = replace(get_task("shapes"), name="elsewhere", remote=True)
    monkeypatch.setattr(grid, "get_task", get_task if known else lambda name: remote)
    found = vtr("sweep", write(tmp_path, methods="[full]", plans="[]", settings="{}"), "--out", tmp_path / "out", "--dry-run")
    assert found.exit_code == 0, found.stderr
    if known:
        assert "unknown" not in found.stdout
    else:
        assert "unknown TFLOPs to go: how many samples the tasks have, or how large their images are, is not known here" in found.stdout
        assert " 0 TFLOPs" not in found.stdout and "1 cells, 0 finished" in found.stdout
    lines = [
        Line(Forecast(1, 1.0, False, 2.0), samples, finished) for samples, finished in ((3, True), (3, False), (None, False), (None, True))
    ]
    said = to_go(Estimate(lines, 2, 6.0, 1, "", []))
    assert said == "6 TFLOPs to go and unknown ones of 1 cells, of which the samples or their size are not known here"


def test_the_help_says_what_a_budget_means():
    said = " ".join(vtr("sweep", "--help").stdout.split())
    assert "is what every method leaves at the end, as in `vtr eval`" in said and "equalise: average_keep" in said


def test_a_dry_run_is_also_for_another_machine_and_says_what_all_leaves_out(tmp_path):
    file = write(tmp_path, models="llava-1.5-7b", methods="all", plans="[]", settings="{}", equalise="average_keep", device="'cuda:99'")
    found = vtr("sweep", file, "--dry-run", "--out", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    assert "warning: for another machine: 'cuda:99' does not exist on this machine" in found.stderr
    left_out = [line for line in found.stderr.splitlines() if line.startswith("left out:")]
    (transprune,) = [line for line in left_out if line.startswith("left out: transprune average_keep=64.0 on llava-1.5-7b: ")]
    assert "out of reach" in transprune and f"({len(left_out)} left out, see above)" in found.stdout
    assert "which cells are finished is not known here" in found.stdout
    refused = vtr("sweep", file, "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "device: 'cuda:99' does not exist on this machine" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_mistakes_cost_nothing(tmp_path):
    found = vtr("sweep", write(tmp_path), "limt=3", "tasks=[shape]", "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "2 mistakes" in found.stderr and "did you mean 'limit'" in found.stderr and "did you mean 'shapes'" in found.stderr
    assert not (tmp_path / "out").exists()
