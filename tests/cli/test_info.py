"""`vtr info METHOD`: what was measured, on the embedded checkpoints or in a folder of the user's own."""

from pathlib import Path

from tests.command_line import CliRunner
from tests.eval.report.made import content
from vtr.cli import app
from vtr.eval import measured
from vtr.eval.run.results import write_cell

ROOT = Path(__file__).parents[2]


def info(*arguments):
    result = CliRunner().invoke(app, ["info", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


def test_a_folder_of_the_users_own_is_shown(tmp_path):
    for one in (content("random", 0.6, keep=64), content("fastv", {"existence": 0.9, "text": 0.3}, keep=64, layer=2)):
        write_cell(tmp_path, **{name: one[name] for name in ("fingerprint", "conditions", "summary", "samples")})
    code, shown = info("fastv", "--results", tmp_path)
    assert code == 0 and "tiny on shapes v1 keep 64" in shown and shown.count("60.0") == 2 and "64.0 64.0 text" in shown
    code, shown = info("dart", "--results", tmp_path)
    assert code == 0 and f"measured: nothing of dart in {tmp_path}" in shown


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    code, shown = info("fastv", "--results", tmp_path / "nowhere")
    assert code == 2 and "no folder" in shown


def test_what_comes_with_vtr_is_shown_and_stands_on_the_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [one for one in measured.read_measured() if one.method == "divprune"]
    assert lines
    code, shown = info("divprune")
    page = (ROOT / "docs" / "methods" / "divprune.md").read_text()
    assert code == 0
    for one in lines:
        assert one.score in shown and f"| {one.on} | {one.setting} | {one.score} |" in page


def test_an_installation_without_the_file_says_so(monkeypatch):
    monkeypatch.setattr(measured, "shared_folders", lambda name: [])
    code, shown = info("divprune")
    assert code == 0 and "measured: nothing of divprune on the embedded checkpoints" in shown
