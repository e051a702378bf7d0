"""Result files: complete or not there, and nothing read is trusted."""

import json
import os

import pytest

from vtr.eval.run import results

FINGERPRINT = {
    "method": "fastv",
    "settings": {"keep": 64, "layer": 2},
    "seed": None,
    "model": {"name": "org/tiny model", "sha256": "0"},
    "task": {"name": "shapes", "version": "v1", "sha256": "1", "limit": None},
}
PARTS = {
    "fingerprint": FINGERPRINT,
    "conditions": {"threads": 2},
    "summary": {"macro": 0.5},
    "samples": [{"id": "a", "correct": True, "latency_ms": 1.25}, {"id": "b", "correct": False, "latency_ms": 0.1}],
}


def test_what_is_written_is_read_back(tmp_path):
    path = results.write_cell(tmp_path, **PARTS)
    content = results.read_cell(path)
    assert {name: content[name] for name in PARTS} == PARTS
    assert content["key"] == results.content_hash(FINGERPRINT)
    assert results.read_folder(tmp_path) == ([content], [])
    assert len(path.read_text().splitlines()) < 40, "one line per sample, not one per number"


def test_file_names_are_readable_and_differ_with_the_fingerprint(tmp_path):
    path = results.cell_path(tmp_path, FINGERPRINT)
    assert path.name.startswith("tiny-model.fastv.keep-64.shapes.")
    other = {**FINGERPRINT, "settings": {"keep": 64, "layer": 3}}
    assert results.cell_path(tmp_path, other) != path
    assert ".seed-2." in results.cell_path(tmp_path, {**FINGERPRINT, "seed": 2}).name
    assert "../" not in results.cell_path(tmp_path, {**FINGERPRINT, "model": {"name": "a/../../x y"}}).name


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "not complete JSON"),
        (lambda text: "", "not complete JSON"),
        (lambda text: '{"some": "thing"}', "not a result of vtr eval"),
        (lambda text: "[1, 2]", "not a result of vtr eval"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema 99, this version reads 1"),
        (lambda text: text.replace('"correct": false', '"correct": true'), "does not match its digest"),
        (lambda text: text.replace('"layer": 2', '"layer": 3'), "does not match its digest"),
    ],
)
def test_damaged_foreign_and_edited_files_are_reported(tmp_path, damage, reason):
    path = results.write_cell(tmp_path, **PARTS)
    path.write_text(damage(path.read_text()))
    with pytest.raises(results.ResultError, match=reason):
        results.read_cell(path)
    cells, problems = results.read_folder(tmp_path)
    assert cells == []
    assert len(problems) == 1
    assert path.name in problems[0]


def test_bytes_that_are_no_text_are_reported(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    assert "not complete JSON" in results.read_folder(tmp_path)[1][0]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch, stop):
    path = results.write_cell(tmp_path, **PARTS)
    before = path.read_text()

    def interrupted(handle):
        raise stop

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(stop):
        results.write_cell(tmp_path, **{**PARTS, "summary": {"macro": 0.9}})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_text_in_samples_cannot_break_the_layout(tmp_path):
    key = results.content_hash(FINGERPRINT)
    odd = [{"id": f'"samples {key}"', "prediction": 'quote " backslash \\ newline \n umlaut ü'}]
    path = results.write_cell(tmp_path, **{**PARTS, "samples": odd})
    assert results.read_cell(path)["samples"] == odd
    json.loads(path.read_text())


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="[Oo]ut of range float"):
        results.write_cell(tmp_path, **{**PARTS, "summary": {"macro": float("nan")}})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*file.*choose another folder"):
        results.prepare_folder(tmp_path / "file" / "results")
    assert results.prepare_folder(tmp_path / "a" / "b").is_dir()


def test_what_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.json").symlink_to(tmp_path / "gone")
    cells, problems = results.read_folder(tmp_path)
    assert cells == [] and "not complete JSON" not in "".join(problems)
    assert problems == ["a.json: cannot be read (is a directory)", "b.json: cannot be read (it is a link to a file that is not there)"]
    assert results.read_folder(tmp_path, {tmp_path / "a.json", tmp_path / "b.json"})[1] == []
