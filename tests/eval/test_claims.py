"""One process at a time runs a cell, and a killed owner stands in nobody's way."""

import os
import signal

from vtr.eval.claims import Claim, claim_path


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
