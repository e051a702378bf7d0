"""`vtr report`: from a folder of results to Markdown, CSV, LaTeX and HTML."""

from pathlib import Path

import pytest

from tests.command_line import CliRunner
from tests.embedded import random_checkpoint
from tests.eval.report.made import content
from vtr.cli import app
from vtr.eval.run.failures import Failure, write_failure
from vtr.eval.run.results import write_cell
from vtr.registry import method_class
from vtr.types.settings import default_settings


def vtr(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def fill(folder, share=0.5, latency=20.0):
    """A folder with results of `full` and two seeds of `random`; returns the fingerprint of the last."""
    folder.mkdir()
    made = [content("full", 0.9, summary={"latency_ms": latency})]
    made += [content("random", share, seed=seed, keep=64, summary={"latency_ms": latency}) for seed in (0, 1)]
    for one in made:
        write_cell(folder, **{name: one[name] for name in ("fingerprint", "conditions", "summary", "samples")})
    return made[-1]["fingerprint"]


def test_results_of_a_run_become_tables_between_the_marks(tmp_path):
    folder, page = tmp_path / "cells", tmp_path / "results.md"
    done = vtr("eval", "--model", random_checkpoint(), "--methods", "full,random", "--keep", 8, "--limit", 1, "--out", folder, "--quiet")
    assert done.exit_code == 0, done.output
    page.write_text("# Results\n\n<!-- tables:begin -->\nold\n<!-- tables:end -->\n\nWords after.\n")
    assert vtr("report", folder, "--out", page).exit_code == 0
    text = page.read_text()
    assert text.startswith("# Results") and text.endswith("Words after.\n") and "old" not in text
    assert "### keep 8" in text and "| full |" in text
    assert vtr("report", folder, "--out", page).exit_code == 0 and page.read_text() == text


def test_a_page_may_have_several_blocks(tmp_path):
    page = tmp_path / "results.md"
    fill(tmp_path / "cells")
    page.write_text("<!-- tables:begin -->\nfirst\n<!-- tables:end -->\n<!-- more:begin -->\nsecond\n<!-- more:end -->\n")
    assert vtr("report", tmp_path / "cells", "--out", page, "--block", "more").exit_code == 0
    text = page.read_text()
    assert "first" in text and "second" not in text and text.index("### keep 64") > text.index("<!-- more:begin -->")
    for given in (("--out", page), ("--out", tmp_path / "a.csv"), ()):
        refused = vtr("report", tmp_path / "cells", *given, "--block", "others")
        assert refused.exit_code == 2 and "--block: no marks <!-- others:begin -->" in refused.output
    assert page.read_text() == text


def test_a_folder_without_results_is_refused(tmp_path):
    for folder, message in ((tmp_path, "no results in"), (tmp_path / "nowhere", "no folder")):
        result = vtr("report", folder)
        assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize(
    ("name", "begins"), [("a.md", "**Warnings**"), ("a.csv", "part,"), ("a.tex", "% warning"), ("a.html", "<!DOCTYPE html>")]
)
def test_every_format_is_written_by_the_name_of_the_file(tmp_path, name, begins):
    fill(tmp_path / "cells")
    result = vtr("report", tmp_path / "cells", "--out", tmp_path / "new" / name)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / name).read_text().startswith(begins)
    assert not [p for p in (tmp_path / "new").iterdir() if p.name != name]


def test_without_a_file_the_text_is_printed_and_warnings_go_to_stderr(tmp_path):
    fill(tmp_path / "cells")
    result = vtr("report", tmp_path / "cells", "--format", "csv")
    assert result.stdout.startswith("part,table,row") and "warning: tiny on shapes v1: keep 64: rows that belong here" in result.stderr
    assert vtr("report", tmp_path / "cells", "--format", "pdf").exit_code == 2


def test_plots_lie_where_markdown_shows_them(tmp_path):
    fill(tmp_path / "cells")
    result = vtr("report", tmp_path / "cells", "--out", tmp_path / "page" / "a.md", "--plots", tmp_path / "page" / "plots", "--no-timings")
    assert result.exit_code == 0, result.output
    pictures = [line.split("](")[1][:-1] for line in (tmp_path / "page" / "a.md").read_text().splitlines() if line.startswith("![")]
    assert len(pictures) == 3 and all((tmp_path / "page" / picture).is_file() for picture in pictures)


def test_without_timings_two_runs_of_one_experiment_give_the_same_bytes(tmp_path):
    fill(tmp_path / "one", latency=20.0)
    fill(tmp_path / "two", latency=30.0)
    texts = [vtr("report", tmp_path / name, "--no-timings", "--format", "csv").stdout for name in ("one", "two")]
    assert texts[0] == texts[1] != vtr("report", tmp_path / "one", "--format", "csv").stdout


def test_a_record_of_vtr_bench_gives_prefill_floors_and_memory(tmp_path):
    (tmp_path / "cells").mkdir()
    settings = {"keep": 64, **{k: v for k, v in default_settings(method_class("fastv")).items() if k != "keep"}}
    made = content("fastv", 0.5, fingerprint={"model": {"name": "tiny-llava", "sha256": "0"}}, **settings)
    write_cell(tmp_path / "cells", **{name: made[name] for name in ("fingerprint", "conditions", "summary", "samples")})
    record = Path(__file__).parents[1] / "eval" / "report" / "bench-tiny-llava.json"
    result = vtr("report", tmp_path / "cells", "--speed", record, "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    assert "### keep 64: speed, batch 1" in result.stdout and "| prefill floor ms |" in result.stdout and record.name in result.stdout
    assert len(list((tmp_path / "plots").glob("*.prefill_ms.*.png"))) == 2
    for path, message in ((tmp_path / "gone.json", "cannot read"), (tmp_path, "cannot read")):
        refused = vtr("report", tmp_path / "cells", "--speed", path)
        assert refused.exit_code == 2 and message in refused.output


def test_what_cannot_be_trusted_failed_or_contradicts_is_named(tmp_path):
    printed = fill(tmp_path / "cells")
    fill(tmp_path / "again", share=0.6)
    whole = sorted((tmp_path / "cells").glob("*.json"))[-1]
    (tmp_path / "cells" / "half.json").write_text(whole.read_text()[:500])
    write_failure(tmp_path / "cells", {**printed, "method": "fastv"}, Failure("layer: must be below 6, got 9", "ValueError"))
    write_failure(tmp_path / "cells", printed, Failure("was run again and is there now", "ValueError"))
    result = vtr("report", tmp_path / "cells", tmp_path / "again")
    assert "warning: ignored half.json: not complete JSON" in result.stderr
    assert "warning: failed: fastv keep=64 seed=1 on shapes: layer: must be below 6, got 9" in result.stderr
    assert "the same experiment with other outcomes lies in another folder" in result.stderr
    assert "was run again" not in result.stderr


def test_a_result_without_what_every_result_has_is_named(tmp_path):
    fill(tmp_path / "cells")
    bad = content("gone", keep=64)
    del bad["samples"][0]["correct"]
    write_cell(tmp_path / "cells", **{name: bad[name] for name in ("fingerprint", "conditions", "summary", "samples")})
    result = vtr("report", tmp_path / "cells")
    assert result.exit_code == 0 and "KeyError 'correct' in its content; run the cell again" in result.stderr
