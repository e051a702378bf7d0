"""Workers on Ray give what one process gives, and one that is killed costs nothing but time."""

import os
import signal
import threading
import time

import pytest

pytest.importorskip("ray")

import ray

from tests.embedded import random_checkpoint
from vtr.eval.run import results
from vtr.eval.run.cells import plan_cells
from vtr.eval.run.cluster import RayPool
from vtr.eval.run.work import Silent, run_jobs
from vtr.eval.run.workers import Job, LocalPool, Setup
from vtr.eval.tasks import get_task
from vtr.types import Budget, VtrError

pytestmark = pytest.mark.slow


def answers(folder):
    cells, problems = results.read_folder(folder)
    assert problems == []
    return {cell["key"]: [{k: v for k, v in sample.items() if not k.endswith("_ms")} for sample in cell["samples"]] for cell in cells}


@pytest.fixture(scope="module")
def jobs():
    cells = plan_cells(
        ["full", "random", "fastv"], [Budget(keep=keep) for keep in (192, 128, 64)], [get_task("shapes")], [0, 1], limit=2, max_new_tokens=2
    )
    return [Job(Setup(str(random_checkpoint()), device="cpu", batch_size=5), cell) for cell in cells]


@pytest.fixture(scope="module")
def alone(jobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_jobs(jobs, folder, LocalPool())
    return answers(folder)


@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # else Ray kills workers for the memory that others use
    with RayPool("local", workers=2, cpus=1, gpus=0, threads=1) as pool:
        yield pool


def test_two_workers_answer_as_one_process_and_a_killed_one_is_replaced(jobs, alone, two_workers, tmp_path):
    killed = []

    class Killer(Silent):
        ended_cells = 0

        def ended(self, job, failure):
            assert failure is None, failure
            self.ended_cells += 1
            if self.ended_cells == 2:
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    two_workers.describe(jobs[0].setup)
    victim = ray.get([hand.actor.process.remote() for hand in two_workers._hands])[1]
    done = run_jobs(jobs, tmp_path, two_workers, Killer())
    assert killed == [victim] and done.failures == [] and done.ran == len(jobs)
    assert answers(tmp_path) == alone


def test_a_cell_that_kills_every_worker_is_given_up_and_the_others_run(jobs, alone, two_workers, tmp_path):
    stop = threading.Event()

    def hunt():  # whoever holds the first cell dies
        while not stop.is_set():
            for task in list(two_workers._tasks.values()):
                if task.key == poison:
                    ray.kill(task.hand.actor)
            time.sleep(0.05)

    poison = results.cell_path(tmp_path, two_workers.describe(jobs[0].setup).fingerprint(jobs[0].cell))
    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        done = run_jobs(jobs, tmp_path, two_workers)
    finally:
        stop.set()
        hunter.join()
    ((job, failure),) = done.failures
    assert job is jobs[0] and "the worker died 3 times" in failure.error
    assert len(answers(tmp_path)) == len(jobs) - 1


def test_what_a_cluster_cannot_give_is_refused():
    with pytest.raises(VtrError, match="a worker needs 1 CPU and 5 GPU, the cluster has 1 and"):
        RayPool("local", workers=1, cpus=1, gpus=5)
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere:port"])
def test_an_address_where_nobody_listens_is_told_at_once(address):
    with pytest.raises(VtrError, match=f"no cluster at '{address}' .*start one with `ray start --head`"):
        RayPool(address, workers=1)


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="jobs: must be at least 1, got 0"):
        RayPool("local", workers=0)
