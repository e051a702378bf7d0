"""Ctrl-C and kill at any moment: nothing half-written, at most the running cell is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.embedded import random_checkpoint
from vtr.eval import results

ROOT = Path(__file__).parents[2]


def start(folder, *methods):
    command = [sys.executable, "-m", "vtr", "eval", "--model", random_checkpoint(), "--methods", ",".join(methods), "--out", folder]
    keeps = ",".join(map(str, range(1, 60)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ("--keep", keeps, "--limit", "2", "--batch-size", "2", "--max-new-tokens", "2")
    return subprocess.Popen([*map(str, command), *options], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_files(folder, count, process, most_s=300):
    end = time.monotonic() + most_s
    while len(list(folder.glob("*.json"))) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_run_leaves_whole_cells_and_goes_on(tmp_path, how, code):
    process = start(tmp_path, "full", "uniform")
    wait_for_files(tmp_path, 2, process)
    process.send_signal(how)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == code
    assert "Traceback" not in said
    finished, problems = results.read_folder(tmp_path)
    assert problems == []
    assert 2 <= len(finished) < 60
    if how == signal.SIGINT:
        assert all(path.suffix == ".json" for path in tmp_path.iterdir()), "no temporary file is left"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    process = start(tmp_path, "full", "uniform")
    wait_for_files(tmp_path, len(before) + 1, process)
    process.kill()
    process.communicate(timeout=120)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("module", ["torch.types", "torch.nn", "typer.main"])
@pytest.mark.parametrize("command", [("list",), ("floors", "--limit", "2")])
def test_a_command_that_is_stopped_while_it_is_imported_says_nothing(command, module):
    interpreter = [sys.executable, "-X", "importtime", "-m", "vtr", *command]
    process = subprocess.Popen(interpreter, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            break
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert printed == "" and all(line.startswith("import time:") for line in said.splitlines())


def test_ctrl_c_of_a_program_that_only_imports_vtr_stays_its_own():
    code = "import signal; before = signal.getsignal(signal.SIGINT); import vtr; print(signal.getsignal(signal.SIGINT) is before)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "True\n"
