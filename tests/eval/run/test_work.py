"""Jobs on workers, without models: what is run, what never again, what is recorded, and who is in whose way."""

import threading
from dataclasses import dataclass

import pytest

from vtr.eval.run import results, work
from vtr.eval.run.cells import Cell
from vtr.eval.run.claims import Claim
from vtr.eval.run.failures import Failure, failure_of, read_failures
from vtr.eval.run.work import Silent, run_jobs
from vtr.eval.run.workers import Job, LocalPool, Setup
from vtr.eval.tasks import Task
from vtr.registry import create_method

TASK = Task("made-up", "v1", "0", ("a",), lambda limit: [], lambda p, a: p == a, 4)
SETUPS = (Setup("one"), Setup("two"))


@dataclass
class Around:
    """Stands for the surroundings on some machine."""

    setup: Setup

    def fingerprint(self, cell):
        return {
            "method": cell.name,
            "settings": cell.settings,
            "seed": cell.seed,
            "model": {"name": self.setup.model},
            "task": {"name": cell.task.name},
        }


class Fake:
    """A worker that notes what it runs; one budget fails."""

    unlucky = 13

    def __init__(self):
        self.ran = []

    def describe(self, setup):
        return Around(setup)

    def run(self, job, advance=None):
        self.ran.append((job.setup.model, job.cell.label))
        if job.cell.settings.get("keep") == self.unlucky:
            return failure_of(RuntimeError("no luck\nat all"))
        return {
            "fingerprint": Around(job.setup).fingerprint(job.cell),
            "conditions": {},
            "summary": {"samples": 1},
            "samples": [{"id": "a"}],
        }


class Ear(Silent):
    def __init__(self):
        self.problems, self.plans, self.failed, self.waits = [], [], [], 0

    def problem(self, text):
        self.problems.append(text)

    def planned(self, total, finished, failed):
        self.plans.append((total, finished, failed))

    def ended(self, job, failure):
        self.failed += [failure.error] if failure else []

    def waiting(self, count):
        self.waits += 1


def jobs(*keeps, setup=SETUPS[0]):
    return [Job(setup, Cell(create_method("uniform", keep=keep), TASK)) for keep in keeps]


def run(given, folder, **settings):
    pool, ear = LocalPool(), Ear()
    pool._worker = worker = Fake()
    done = run_jobs(given, folder, pool, ear, **settings)
    return worker.ran, done, ear


def test_every_cell_once_and_never_again(tmp_path):
    ran, done, _ = run([*jobs(1, 2), *jobs(2)], tmp_path)
    assert [label for _, label in ran] == ["uniform keep=1", "uniform keep=2"]
    assert done.ran == 2 and len(done.fingerprints) == 3 and done.fingerprints[1] == done.fingerprints[2]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json"], "no claim is left"
    ran, done, ear = run(jobs(1, 2, 3), tmp_path)
    assert [label for _, label in ran] == ["uniform keep=3"]
    assert ear.plans == [(3, 2, 0)]


def test_a_model_is_loaded_once(tmp_path):
    mixed = [job for keep in (1, 2, 3) for setup in SETUPS for job in jobs(keep, setup=setup)]
    ran, _, _ = run(mixed, tmp_path)
    assert [model for model, _ in ran] == ["one"] * 3 + ["two"] * 3


def test_a_failure_is_recorded_and_the_others_run(tmp_path):
    ran, done, ear = run(jobs(13, 1), tmp_path)
    assert len(ran) == 2 and done.ran == 1 and ear.failed == ["no luck"]
    (record,), problems = read_failures(tmp_path)
    assert (record["error"], record["kind"], problems) == ("no luck", "RuntimeError", [])
    assert "at all" in record["traceback"] and record["fingerprint"]["settings"]["keep"] == 13
    assert results.read_folder(tmp_path)[1] == []

    ran, done, ear = run(jobs(13, 1), tmp_path, retry=False)
    assert ran == [] and ear.plans == [(2, 1, 1)]
    assert [failure.error for _, failure in done.failures] == ["no luck"]
    assert len(run(jobs(13, 1), tmp_path, retry=True)[0]) == 1


def test_a_result_removes_the_failure_and_a_broken_record_is_none(tmp_path, monkeypatch):
    run(jobs(13), tmp_path)
    (path,) = (tmp_path / "failed").iterdir()
    content = path.read_text()
    path.write_text("{}")
    assert read_failures(tmp_path) == ([], [f"failed/{path.name}: not a record of a failed cell"])
    assert len(run(jobs(13), tmp_path, retry=False)[0]) == 1
    assert path.read_text().splitlines()[:2] == content.splitlines()[:2]
    monkeypatch.setattr(Fake, "unlucky", 0)
    assert run(jobs(13), tmp_path)[1].ran == 1
    assert not path.exists()


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: "{}", lambda text: text.replace('"id": "a"', '"id": "b"')]
)
def test_a_file_that_cannot_be_trusted_is_reported_and_run_again(tmp_path, damage):
    run(jobs(1), tmp_path)
    (path,) = tmp_path.glob("*.json")
    whole = path.read_text()
    path.write_text(damage(whole))
    ran, _, ear = run(jobs(1), tmp_path)
    assert len(ran) == 1 and len(ear.problems) == 1 and path.name in ear.problems[0]
    assert path.read_text() == whole


def test_a_claimed_cell_is_left_to_its_owner_and_taken_over_when_it_goes(tmp_path, monkeypatch):
    given = jobs(1, 2)
    path = results.cell_path(tmp_path, Around(given[0].setup).fingerprint(given[0].cell))
    claim = Claim.take(path)
    monkeypatch.setattr(work.time, "sleep", lambda seconds: claim.release())
    ran, done, ear = run(given, tmp_path)
    assert [label for _, label in ran] == ["uniform keep=2", "uniform keep=1"]
    assert ear.waits == 1 and done.ran == 2


def test_what_another_finishes_meanwhile_is_not_run(tmp_path, monkeypatch):
    given = jobs(1, 13)
    paths = [results.cell_path(tmp_path, Around(job.setup).fingerprint(job.cell)) for job in given]
    claims = [Claim.take(path) for path in paths]

    def others(seconds):
        for claim in claims:
            claim.release()
        run(given, tmp_path)

    monkeypatch.setattr(work.time, "sleep", others)
    ran, done, _ = run(given, tmp_path)
    assert ran == [] and done.ran == 0
    assert [failure.error for _, failure in done.failures] == ["no luck"]


def test_two_at_once_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "POLL_S", 0.01)
    given, found = jobs(*range(20, 40)), []
    threads = [threading.Thread(target=lambda: found.append(run(given, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(label for ran, _, _ in found for _, label in ran) == sorted(job.cell.label for job in given)
    cells, problems = results.read_folder(tmp_path)
    assert len(cells) == 20 and problems == []


def test_claims_are_given_back_when_a_result_cannot_be_written(tmp_path, monkeypatch):
    def full(*_args, **_parts):
        raise OSError("disk full")

    monkeypatch.setattr(results, "write_cell", full)
    with pytest.raises(OSError, match="disk full"):
        run(jobs(1), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_first_line_of_an_error_is_kept():
    assert failure_of(ValueError()).error == "ValueError"
    assert failure_of(KeyError("x")) == Failure("'x'", "KeyError", "KeyError: 'x'\n")


def test_every_file_that_cannot_be_trusted_is_named_once_also_a_link_to_nothing(tmp_path):
    run(jobs(1, 2), tmp_path)
    one, two = sorted(tmp_path.glob("*.json"))
    one.write_text("{")
    two.unlink()
    two.symlink_to(tmp_path / "gone")
    (tmp_path / "foreign.json").write_text("{}")
    ran, _, ear = run(jobs(1, 2), tmp_path)
    assert len(ran) == 2 and len(ear.problems) == 3
    for name, said in ((one.name, "run again"), (two.name, "run again"), ("foreign.json", "not a result")):
        assert [said in line for line in ear.problems if name in line] == [True]


def test_a_folder_where_a_result_belongs_is_refused_before_anything_runs(tmp_path):
    run(jobs(1), tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"is a folder where a result belongs; move it away"):
        run(jobs(2, 1), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
