"""Every command on a page has the options that it is given there; those that need no network, no GPU and no minutes are run."""

import configparser
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from tests.command_line import CliRunner
from tests.docs.pages import ROOT, Block, blocks
from vtr.cli import app

NOT_RUN = {
    "vtr eval": "answers questions for minutes; tests/eval runs it",
    "vtr sweep": "answers questions for minutes, or wants Ray; what --dry-run says is run, but of the largest grid",
    "vtr bench": "times for minutes; tests/bench runs it",
    "vtr speedup": "calibrates for seconds at large shapes; tests/cli/test_speedup.py runs it",
    "vtr report": "wants the results of `vtr eval`; tests/eval/report runs it",
    "vtr tune": "measures for minutes; tests/cli/test_tune.py runs it",
    "vtr ui": "serves a page until it is stopped",
    "vtr run --model tiny-llava --plan": "a plan that `vtr tune` wrote",
    "vtr check my_method": "a method of the reader's",
    "vtr run --model llava-onevision-7b": "a checkpoint of the hub",
}
"""Commands whose options alone are checked, and why."""
ELSEWHERE = ("make", "pip", "python", "sbatch", "accelerate")
"""What is no command of vtr; targets, extras and files that it names are looked for."""
FAST = ("vtr list", "vtr models", "vtr info")
USAGE = typer.BadParameter.__mro__[1]
"""What typer raises for options that a command does not have, or not so."""


def commands(block: Block) -> list[str]:
    """The commands of a block, without comments, line by line."""
    text = re.sub(r"\s+#.*$", "", block.code.replace("\\\n", " "), flags=re.MULTILINE)
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


COMMANDS = [pytest.param(line, id=f"{block}: {line[:60]}") for block in blocks("bash") for line in commands(block)]
OURS = [param for param in COMMANDS if str(param.values[0]).startswith("vtr ")]


def parse(line: str) -> None:
    """Parses a command of vtr as the command line would, and runs nothing."""
    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no such command: {line}"
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


@pytest.mark.parametrize("line", OURS)
def test_vtr_has_the_command_and_its_options(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", ["vtr lst", "vtr list --stag boundary", "vtr run --keep many --image a.png", "vtr info"])
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((AssertionError, USAGE)):
        parse(line)


def is_run(line: str) -> bool:
    dry = "--dry-run" in line and "main-table" not in line
    return dry or not any(line.startswith(command) for command in NOT_RUN)


RUN = list(dict.fromkeys(line for line in (str(param.values[0]) for param in OURS) if is_run(line)))


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=line[:60], marks=[] if line.startswith(FAST) else [pytest.mark.slow]) for line in RUN]
)
def test_it_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[1:]
    if words[0] == "run":
        words += ["--out", str(tmp_path / "pictures")]
    if "frames/" in words:  # of the reader
        (tmp_path / "frames").mkdir()
        for number in range(4):
            Image.new("RGB", (64, 48), (60 * number, 0, 0)).save(tmp_path / "frames" / f"{number}.png")
        words[words.index("frames/")] = str(tmp_path / "frames")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output + repr(result.exception)


@pytest.mark.parametrize("line", [param for param in COMMANDS if param not in OURS])
def test_what_another_command_names_is_there(line: str) -> None:
    words = shlex.split(line)
    assert words[0] in ELSEWHERE, f"{words[0]}: neither vtr nor in ELSEWHERE"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"\[(\w+(?:,\w+)*)\]", line) if words[0] == "pip" else ():
        assert set(extras.split(",")) <= set(setup["options.extras_require"])
    named = [word for word in words[1:] if re.match(r"(scripts|eval|constraints)/", word)]
    assert all((ROOT / name).exists() for name in named), named


def test_every_reason_is_of_a_command_on_a_page() -> None:
    lines, there = [str(param.values[0]) for param in OURS], typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert all(any(line.startswith(command) for line in lines) for command in NOT_RUN if command.split()[1] in there)
