"""Ctrl-C and kill at any moment: nothing half-written, at most the running cell is lost."""

import os
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.command_line import CliRunner
from tests.embedded import random_checkpoint
from tests.marks import quick_first
from vtr.__main__ import main
from vtr.cli import app
from vtr.eval.run import results

ROOT = Path(__file__).parents[2]


def arguments(folder, most):
    """Of a run with one cell for the full model and one for each budget up to `most`."""
    keeps = ",".join(map(str, range(1, most + 1)))
    options = ("--keep", keeps, "--limit", "2", "--batch-size", "2", "--max-new-tokens", "2")
    return ["eval", "--model", str(random_checkpoint()), "--methods", "full,uniform", "--out", str(folder), *options]


def start(folder, most):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vtr", *arguments(folder, most)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_files(folder, count, process, most_s=300):
    end = time.monotonic() + most_s
    while len(list(folder.glob("*.json"))) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_run_leaves_whole_cells_and_goes_on(tmp_path, how, code):
    process = start(tmp_path, 24)
    wait_for_files(tmp_path, 2, process)
    process.send_signal(how)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == code
    assert "Traceback" not in said
    finished, problems = results.read_folder(tmp_path)
    assert problems == []
    assert 2 <= len(finished) < 25
    if how == signal.SIGINT:
        assert all(path.suffix == ".json" for path in tmp_path.iterdir()), "no temporary file is left"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    again = CliRunner().invoke(app, arguments(tmp_path, len(before)))  # a cell more than there are
    assert again.exit_code == 0, again.output
    assert len(list(tmp_path.glob("*.json"))) == len(before) + 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


CONSOLE_SCRIPT = "import sys; from vtr.__main__ import main; sys.argv[0] = 'vtr'; sys.exit(main())"
"""What pip writes for the entry point."""


def test_the_entry_point_is_the_one_that_is_tested_here():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert "vtr = vtr.__main__:main" in config["options.entry_points"]["console_scripts"].splitlines()


@pytest.mark.parametrize("module", quick_first(["vtr", "torch.types", "torch.nn", "typer.main"]))
@pytest.mark.parametrize("command", [("-m", "vtr", "list"), ("-c", CONSOLE_SCRIPT, "demo", "--keep", "2")], ids=["module", "script"])
def test_a_command_that_is_stopped_while_it_is_imported_says_nothing(command, module):
    interpreter = [sys.executable, "-X", "importtime", *command]
    process = subprocess.Popen(interpreter, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            break
    if module == "vtr":
        time.sleep(0.05)  # from its import to the handler are some statements
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert printed == "" and all(line.startswith("import time:") for line in said.splitlines())


def test_the_command_takes_ctrl_c_as_python_does_once_it_is_imported(monkeypatch):
    seen = []
    monkeypatch.setattr("vtr.cli.app", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    try:
        main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.default_int_handler]
