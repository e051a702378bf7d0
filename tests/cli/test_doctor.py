"""`vtr doctor` from any folder: what is installed, and exit code 1 when a check fails."""

import json

import pytest
import torch
import transformers

import vtr.versions
from tests.command_line import CliRunner
from vtr.cli import app
from vtr.engine.llm import hooks as llm


def doctor(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_it_shows_versions_devices_backends_and_checks():
    shown = doctor()
    for part in (vtr.__version__, transformers.__version__, torch.__version__.split("+")[0], "cpu, ", "sdpa", "flash_attention_2"):
        assert part in shown
    assert shown.count("pass") >= 20 and "FAILED" not in shown and "batch = single" in shown


def test_a_failing_check_is_named_and_the_exit_code_is_1(monkeypatch):
    monkeypatch.setattr(llm, "mask", lambda *_: None)
    monkeypatch.setattr(vtr.versions, "tested", lambda: {"transformers": "5.0.0"})
    lines = [" ".join(line.split()) for line in doctor("--quick", code=1).splitlines()]
    failed = [line for line in lines if "FAILED" in line]
    assert failed and all(line.startswith("LLM method, LLaVA: ") for line in failed)
    assert f"transformers {transformers.__version__} 5.0.0 newer than tested" in lines
    last = f"{len(failed)} of 4 checks failed: results of reduced models are wrong here. Newer than tested: transformers {transformers.__version__};"
    assert lines[-1].startswith(last)
    monkeypatch.setattr(vtr.versions, "tested", dict)
    assert "Please report it with `vtr doctor --json`" in doctor("--quick", code=1)


def test_json_has_the_same(monkeypatch):
    monkeypatch.setattr(vtr.versions, "tested", lambda: {"transformers": transformers.__version__, "timm": "99.0", "ray": "0.1"})
    found = json.loads(doctor("--json", "--quick"))
    verdicts = {row["package"]: row["verdict"] for row in found["packages"]}
    assert verdicts["transformers"] == "as tested" and verdicts["timm"] in ("older", "not installed")
    assert verdicts["ray"] in ("newer", "not installed")
    assert [check["passed"] for check in found["checks"]] == [True] * 4 and found["attention"]["sdpa"] is True
    assert found["devices"][-1].startswith("cpu, ")

    def broken(*_):
        raise AttributeError("renamed")

    monkeypatch.setattr(llm, "mask", broken)
    checks = json.loads(doctor("--json", "--quick", code=1))["checks"]
    assert [check["error"] for check in checks if not check["passed"]] == ["AttributeError: renamed"] * 2
    assert all(check["difference"] is None for check in checks if not check["passed"])


def test_a_package_that_is_missing_is_no_failure(monkeypatch):
    monkeypatch.setattr(vtr.versions, "installed", lambda name: None)
    assert "not installed" in doctor("--quick")
