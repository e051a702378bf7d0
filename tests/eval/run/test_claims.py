"""One process at a time runs a cell, and a killed owner stands in nobody's way."""

import importlib
import os
import re
import signal
import sys

import pytest

import vtr.eval.run.claims
from tests.command_line import CliRunner
from tests.embedded import random_checkpoint
from vtr import VtrError
from vtr.cli import app
from vtr.eval.run.claims import Claim, claim_path


def test_one_at_a_time_and_nothing_is_left(tmp_path):
    target = tmp_path / "a.json"
    claim = Claim.take(target)
    assert Claim.take(target) is None
    assert Claim.take(tmp_path / "b.json") is not None
    claim.release()
    claim.release()
    assert not claim_path(target).exists()
    assert Claim.take(target) is not None


def test_a_killed_owner_leaves_no_lock_and_its_half_written_result_goes(tmp_path):
    target = tmp_path / "a.json"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        claim = Claim.take(target)
        (tmp_path / ".a.json.xyz.tmp").write_text("{half")
        os.write(write, b"1" if claim else b"0")
        signal.pause()
    assert os.read(read, 1) == b"1"
    assert Claim.take(target) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert claim_path(target).exists(), "the file stays, the lock does not"
    claim = Claim.take(target)
    assert claim is not None
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_on_a_file_that_was_removed_meanwhile_is_not_one(tmp_path, monkeypatch):
    import fcntl

    target, lock = tmp_path / "a.json", fcntl.flock
    seen = []

    def removed_first(handle, how):
        lock(handle, how)
        if not seen:
            claim_path(target).unlink()
        seen.append(handle)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    claim = Claim.take(target)
    assert len(seen) == 2
    assert claim_path(target).exists()
    claim.release()


@pytest.fixture
def without_fcntl(monkeypatch):
    """`vtr.eval.run.claims` as it is imported where Python has no fcntl; other libraries keep theirs."""
    importlib.import_module("huggingface_hub.utils")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    yield importlib.reload(vtr.eval.run.claims)
    monkeypatch.undo()
    importlib.reload(vtr.eval.run.claims)


def test_a_system_without_locks_is_named_when_a_claim_is_wanted_and_not_before(tmp_path, without_fcntl):
    with pytest.raises(VtrError, match=r"claims: needs a POSIX system \(Linux, macOS, or WSL under Windows\).* got \w+; use one of those"):
        without_fcntl.Claim.take(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_eval_and_sweep_say_so_before_they_begin(tmp_path, without_fcntl):
    folder, file = tmp_path / "out", tmp_path / "sweep.yaml"
    file.write_text(f"models: {random_checkpoint()}\nmethods: [uniform]\nbudgets: {{keep: [64]}}\ntasks: shapes\nlimit: 1\n")
    commands = {
        "eval": ("--model", random_checkpoint(), "--methods", "full", "--limit", 1, "--out", folder),
        "sweep": (file, "--out", folder),
    }
    for name, arguments in commands.items():
        result = CliRunner().invoke(app, [name, *map(str, arguments)])
        assert re.search(rf"{name}: needs a POSIX system .* got {sys.platform}; use one of those", result.output), result.output
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert not folder.exists()
    pytest.importorskip("pydantic")  # of the extra eval, without which there are no sweeps at all
    assert CliRunner().invoke(app, ["sweep", str(file), "--dry-run"]).exit_code == 0
