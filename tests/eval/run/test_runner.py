"""Running cells: right answers in order, the tower shared only where that changes nothing."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import vtr
from tests.embedded import random_checkpoint
from tests.marks import quick_first
from tests.tiny_models import snapshot
from vtr.eval.run.cells import Cell
from vtr.eval.run.results import read_folder
from vtr.eval.run.runner import Runner, summarise
from vtr.eval.run.sharing import TowerCache
from vtr.eval.run.work import run_jobs
from vtr.eval.run.workers import Job, LocalPool, Setup
from vtr.eval.tasks import Task, get_task
from vtr.models.loading import load_model
from vtr.registry import create_method

SHAPES = get_task("shapes")
PLANS = {
    "full": None,
    "random": create_method("random", keep=64),
    "divprune": create_method("divprune", keep=64),
    "fastv": create_method("fastv", keep=64),
    "none": create_method("none"),
}


@pytest.fixture(scope="module", params=[pytest.param(False, id="llava"), pytest.param(True, id="llava-next", marks=pytest.mark.slow)])
def loaded(request):
    return load_model(str(random_checkpoint(request.param)))


def cell(method, limit=1):
    return Cell(method, SHAPES, limit=limit, max_new_tokens=2)


def without_times(outcomes):
    return [{k: v for k, v in outcome.items() if k != "latency_ms"} for outcome in outcomes]


def runner(loaded, **settings):
    return Runner(*loaded, {"name": "m", "sha256": "0"}, "sdpa", "cpu", **{"batch_size": 2, **settings})


def test_a_shared_tower_changes_no_answer_and_runs_once_per_batch(loaded):
    model = loaded[0]
    own, shared = runner(loaded), runner(loaded, share_tower=True)
    own.answer(cell(None))  # transformers puts its own hooks on the tower at the first call
    before = snapshot(model)
    tower = shared._tower_cache
    for method in PLANS.values():
        assert without_times(shared.answer(cell(method))) == without_times(own.answer(cell(method)))
    assert tower.runs == 3, "five samples in batches of two; counting the tokens of the full model runs nothing"
    assert snapshot(model) == before


@pytest.mark.parametrize(("name", "settings"), [("tome", {"keep_ratio": 0.5}), ("resize", {"keep": 64})])
def test_methods_that_change_the_tower_do_not_share_it(loaded, name, settings):
    method = create_method(name, **settings)
    own, shared = runner(loaded), runner(loaded, share_tower=True)
    shared.answer(cell(None))
    runs = shared._tower_cache.runs
    assert without_times(shared.answer(cell(method))) == without_times(own.answer(cell(method)))
    assert shared._tower_cache.runs == runs


def test_a_full_cache_runs_the_tower_again(loaded):
    model, _ = loaded
    cache = TowerCache(model, most_bytes=0)
    pixels = torch.zeros(1, 3, 192, 192)
    with cache.used_by(None) as used:
        assert used
        first, second = (cache.tower(pixels).last_hidden_state for _ in range(2))
    assert cache.runs == 2
    assert torch.equal(first, second)


def test_the_tower_is_restored_after_an_exception(loaded):
    model, _ = loaded
    cache = TowerCache(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stop"), cache.used_by(None):
        raise RuntimeError("stop")
    assert snapshot(model) == before
    assert isinstance(cache.tower, nn.Module)


def test_samples_keep_their_order_and_progress_is_told(loaded):
    told = []
    outcomes = runner(loaded, batch_size=3).answer(cell(None, limit=2), told.append)
    assert [outcome["id"] for outcome in outcomes] == [sample.id for sample in SHAPES.samples(2)]
    assert told == [3, 3, 3, 1]


def test_batch_size_is_checked(loaded):
    with pytest.raises(ValueError, match="batch size: must be at least 1, got 0"):
        runner(loaded, batch_size=0)


def test_summary_is_derived_from_the_samples(loaded):
    common = {
        "visual_tokens": [576],
        "retained": [64],
        "average_tokens": 64.0,
        "per_layer": [64] * 3,
        "text_tokens": 10,
        "newlines": [0, 0],
    }

    def sample(number, family, correct):
        return {"id": str(number), "family": family, "correct": correct, "latency_ms": 1.0 + number, **common}

    samples = [sample(0, "a", True), sample(1, "a", False), sample(2, "b", True)]
    found = summarise(samples, ("a", "b", "c"), loaded[0].config)
    assert found["families"]["a"]["value"] == 0.5
    assert set(found["families"]) == {"a", "b"}
    assert found["macro"]["value"] == 0.75
    assert found["retained"] == 64
    assert found["latency_ms"] == 2.0
    assert found["kv_mib_fp16"] == pytest.approx(2 * 32 * 2 * 3 * 74 / 2**20)


def test_a_task_of_somebody_else_runs_too(loaded):
    samples = SHAPES.samples(1)[:2]
    task = Task("mine", "v1", "0", ("existence", "attribute"), lambda limit: samples, lambda p, a: True, 3)
    assert [outcome["correct"] for outcome in runner(loaded).answer(Cell(None, task))] == [True, True]


@dataclass(frozen=True, kw_only=True)
class Wrong(vtr.Method):
    """A third party's method that is right for the first images and then keeps another number than it was asked for."""

    kept: int = 10
    right: int = 0
    name: ClassVar[str] = "wrong"
    stages: ClassVar = ("boundary",)
    default_budget: ClassVar = vtr.Budget(keep=64)
    calls: ClassVar[list[int]] = []

    def steps(self, geometry):
        return (vtr.Remove(vtr.Boundary(), self.select),)

    def select(self, view):
        self.calls.append(1)
        rank = view.real.long().cumsum(1)
        return vtr.Selection(keep=view.real & (rank <= (view.keep[:, None] if len(self.calls) <= self.right else self.kept)))


@pytest.mark.parametrize(
    ("kept", "right", "share_tower"),
    quick_first([(63, 4, True), (10, 0, False), (10, 0, True), (100, 0, True), (63, 4, False)]),
)
def test_a_method_that_keeps_another_number_ends_its_cell_and_leaves_no_result(tmp_path, kept, right, share_tower):
    Wrong.calls.clear()
    setup = Setup(str(random_checkpoint()), "cpu", batch_size=1, share_tower=share_tower)
    jobs = [Job(setup, cell(method)) for method in (Wrong(keep=64, kept=kept, right=right), create_method("uniform", keep=64))]
    done = run_jobs(jobs, tmp_path, LocalPool())
    ((failed, failure),) = done.failures
    assert failed.cell.name == "wrong" and done.ran == 1
    assert f"wrong: select kept {kept} visual tokens of an image" in failure.error and "keep was 64" in failure.error
    assert [content["fingerprint"]["method"] for content in read_folder(tmp_path)[0]] == ["uniform"]
    assert len(list((tmp_path / "failed").iterdir())) == 1


def test_a_method_that_keeps_what_it_was_asked_for_is_fine(tmp_path):
    Wrong.calls.clear()
    done = run_jobs([Job(Setup(str(random_checkpoint()), "cpu", batch_size=1), cell(Wrong(keep=64, right=99)))], tmp_path, LocalPool())
    assert (done.ran, done.failures) == (1, [])
