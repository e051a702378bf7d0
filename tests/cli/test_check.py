"""`vtr check` from any folder: methods of ours and of a module beside, a line per check, exit code 1 when one fails."""

import json
import sys

import pytest

from tests.command_line import CliRunner
from vtr import registry
from vtr.cli import app

CAREFUL = """
from dataclasses import dataclass

import vtr


@vtr.register_method("careful")
@dataclass(frozen=True, kw_only=True)
class Careful(vtr.ScoreMethod):
    \"\"\"Keeps the loudest tokens.\"\"\"

    card = vtr.Card(title="keep the loudest", paper="none, a test", ours=True)
    stages = ("boundary",)
    default_budget = vtr.Budget(keep_ratio=0.25)

    def where(self, geometry):
        return vtr.Boundary()

    def score(self, view):
        return view.tokens.float().norm(dim=-1)
"""
CARELESS = CAREFUL.replace("careful", "careless").replace("Careful", "Careless").replace(", ours=True", "")
CARELESS = CARELESS.replace("norm(dim=-1)", "norm(dim=-1) * (1 if len(view.row) > 1 else -1)")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "careful_one.py").write_text(CAREFUL)
    (tmp_path / "careless_one.py").write_text(CARELESS)
    (tmp_path / "broken_one.py").write_text("import nothing_of_that_name")
    yield
    for name in ("careful", "careless"):
        registry._METHODS.pop(name, None)
        sys.modules.pop(f"{name}_one", None)


def check(*arguments, code=0):
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_a_method_of_another_module_passes():
    shown = check("careful", "--import", "careful_one", "--kinds", "llava", "--quiet")
    lines = [line for line in shown.splitlines() if line]  # rich 13 ends a progress that nobody sees with an empty one
    assert "FAIL" not in shown and all(line.startswith("pass") for line in lines[:-1])
    assert any("removed equals masked" in line for line in lines) and any("cached equals recomputed" in line for line in lines)
    assert lines[-1].startswith(f"careful: {len(lines) - 1} of {len(lines) - 1} checks passed")


def test_what_fails_is_said_with_the_methods_name_and_what_to_do():
    """A score that depends on the rows beside: each check that sees it says so, and the card has no citation."""
    shown = check("careless", "--import", "careless_one", "--kinds", "llava", code=1)
    assert "FAIL  the card says what there is" in shown
    assert "careless: the card must cite, got neither arxiv nor code; give arxiv= or code=, or ours=True" in shown
    assert "FAIL  neighbours and left padding change nothing" in shown
    assert "careless: a prompt must keep in a batch (left padding) what it keeps alone, [[" in shown
    assert "let nothing in `select` depend on other rows" in shown and "pass  removed equals masked" in shown


def test_json_has_every_result():
    found = json.loads(check("none", "--kinds", "llava", "--json"))
    assert {entry["who"] for entry in found} == {"none"} and all(entry["passed"] and not entry["error"] for entry in found)
    assert {entry["kind"] for entry in found} == {"", "llava"}


def test_settings_reach_the_method():
    found = json.loads(check("shortv", "--set", "layers=[1,3]", "--kinds", "llava", "--json"))
    assert all(entry["passed"] for entry in found)


def test_what_cannot_be_expressed_by_masks_is_skipped():
    shown = check("resize", "--kinds", "llava")
    assert "skip  removed equals masked" in shown and "has no counterpart in a model with masks" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fastvv",), "unknown method 'fastvv'; did you mean 'fastv'"),
        (("fastv", "--kinds", "lava"), "check_method: unknown kind 'lava'; one of llava, "),
        (("fastv", "--import", "broken_one"), "--import: 'broken_one' cannot be imported: ModuleNotFoundError: No module named"),
        (("fastv", "--set", "layer=a"), "fastv: layer must be an integer, got 'a'"),
        (("fastv", "--set", "layr=1"), "fastv: unknown setting 'layr'; did you mean 'layer'"),
    ],
)
def test_wrong_input_is_one_line(arguments, said):
    assert said in check(*arguments, code=2)
