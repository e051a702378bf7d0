"""`vtr bench` on a shape that takes no time: record, page, and what it refuses."""

import json
import subprocess
import sys

import pytest

from scripts import speed_page
from tests.command_line import CliRunner
from tests.embedded import random_checkpoint, random_internvl, random_qwen
from vtr.cli import app


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "--quiet", *map(str, arguments)])


def test_a_shape_is_timed_recorded_and_put_on_a_page(tmp_path, monkeypatch):
    file, page = tmp_path / "tiny.json", tmp_path / "speed.md"
    asked = ("--methods", "uniform,fastv", "--set", "fastv.layer=1", "--keep", "9,12", "--new-tokens", "1,2", "--repeats", 1)
    result = bench("--model", "llava-tiny", *asked, "--schedule", "own", "--json", file)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert [cell["keep"] for cell in content["cells"]] == [9, 12] and content["model"]["random"] is True
    assert content["environment"]["clock"] == "process time, all threads" and content["environment"]["versions"]["torch"]
    fastv = next(row for row in content["cells"][0]["rows"] if row["name"] == "fastv")
    assert fastv["settings"]["layer"] == 1 and fastv["schedule"]["llm"] == [48, 21, 21, 21] and len(fastv["runs"]) == 1
    monkeypatch.setattr(sys, "argv", ["speed_page.py", "--page", str(page), "--records", str(tmp_path)])
    speed_page.main()
    assert "### 9 tokens kept, batch 1" in page.read_text() and "kept floor" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["speed.md", "tiny.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "bench: nothing to do; give --model or --ops"),
        (("--model", "llava-tiny", "--methods", "fast-v"), "unknown method 'fast-v'; did you mean 'fastv'"),
        (("--model", "llava-tiny", "--keep", "0"), "--keep: numbers must be at least 1, got '0'"),
        (("--model", "llava-tiny", "--set", "layer=2"), "--set: must look like method.key=value here, got layer=2"),
        (("--model", "llava-tiny", "--compiled", "--new-tokens", "1"), "--compiled: an answer of one token has no decode step"),
        (("--model", "llava-med"), "llava-med"),
        (("--model", "llava-tiny", "--json", "nowhere/x.json"), "--json: no folder 'nowhere'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


@pytest.mark.slow
def test_evaluation_libraries_are_not_needed(tmp_path):
    absent = ("pandas", "lmms_eval", "open_clip", "ray")
    command = [
        "bench",
        "--model",
        str(random_checkpoint()),
        "--methods",
        "uniform",
        "--keep",
        "9",
        "--repeats",
        "1",
        "--new-tokens",
        "1",
    ]
    code = f"import sys; [sys.modules.__setitem__(m, None) for m in {absent}]; from vtr.cli import app; app({command})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("folder", "arguments", "tokens"), [(random_qwen, ("--max-pixels", 2304), 9), (random_internvl, (), 45)], ids=["qwen", "internvl"]
)
def test_checkpoints_with_images_of_any_size_are_timed(tmp_path, folder, arguments, tokens):
    file = tmp_path / "own.json"
    result = bench(
        "--model", folder(), "--methods", "divprune,flowcut", "--keep", 4, "--repeats", 1, "--new-tokens", "1,2", *arguments, "--json", file
    )
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["model"]["tokens"] == tokens and {k: v for k, v in content["model"].items() if k == "max_pixels"} == dict(
        zip(("max_pixels",), arguments[1:], strict=False)
    )
    assert [row["kind"] for row in content["cells"][0]["rows"]] == ["full", "kept floor", "method", "method"], "flowcut cuts the tower"
