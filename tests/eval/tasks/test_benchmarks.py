"""Tasks of lmms-eval in our cells: on the shapes tasks of `eval/tasks` they must say what our own task says."""

from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from tests.embedded import random_checkpoint
from vtr.eval.run.cells import Cell
from vtr.eval.run.runner import Runner
from vtr.eval.tasks import benchmarks, get_task, name_in_source
from vtr.eval.tasks.benchmarks import Document, Documents, benchmark, share_of
from vtr.models.loading import load_model
from vtr.registry import create_method
from vtr.types import VtrError


@pytest.fixture
def shapes_only(monkeypatch):
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(verbosity="ERROR", include_path=str(Path(__file__).parents[3] / "eval" / "tasks"), include_defaults=False)
    for cached in (benchmarks._task, benchmarks._documents):
        cached.cache_clear()
    monkeypatch.setattr(benchmarks, "_manager", lambda: manager)
    yield
    for cached in (benchmarks._task, benchmarks._documents):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("value", "share"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.3, 0.3),
        (7, 1.0),
        ({"score": 0.0, "category": "a"}, 0.0),
        ({"prediction": "B. a dog", "answer": "B"}, 1.0),
        ({"prediction": "(b) a dog", "answer": "B"}, 1.0),
        ({"prediction": "Bananas", "answer": "B"}, 0.0),
        ({"pred": "A", "answer": "C"}, 0.0),
        ({"parsed_pred": [["4", 4.0]], "answer": "4"}, 1.0),
        ({"parsed_pred": ["a cat"], "answer": ["A cat", "cat"]}, 1.0),
        ({"question": "?"}, None),
        ("text", None),
    ],
)
def test_what_a_task_says_of_one_sample_becomes_a_share(value, share):
    assert share_of(value) == share


def test_the_same_answers_and_scores_as_our_own_task(shapes_only):
    task, ours = get_task("lmms:shapes_text"), get_task("shapes")
    assert task.remote and task.families == ("shapes_text",) and len(task.sha256) == 64
    runner = Runner(*load_model(str(random_checkpoint())), {"name": "m", "sha256": "0"}, "sdpa", "cpu", batch_size=2)
    for method in (None, create_method("divprune", keep=64)):
        parts = runner.measure(Cell(method, task, limit=3, max_new_tokens=3))
        expected = [s for s in runner.answer(Cell(method, ours, limit=3, max_new_tokens=3)) if s["family"] == "text"]
        for got, wanted in zip(parts["samples"], expected, strict=True):
            assert {k: got[k] for k in ("answer", "prediction", "correct", "retained")} == {
                k: wanted[k] for k in ("answer", "prediction", "correct", "retained")
            }
        assert parts["summary"]["metrics"] == {"exact_match": parts["summary"]["macro"]["value"]}
        assert parts["fingerprint"]["task"]["name"] == "lmms:shapes_text"


def test_samples_are_made_when_they_are_asked_for(shapes_only):
    samples = Documents(["shapes_text"], 4)
    assert len(samples) == 4 and len(Documents(["shapes_text"], None)) == len(get_task("shapes").samples(None)) / 5
    assert [s.id for s in samples[1:3]] == ["shapes_text-1", "shapes_text-2"]
    assert isinstance(samples[0], Document) and samples[0] is not samples[0]
    assert samples[3].image.mode == "RGB"


def test_unknown_names_and_a_missing_package(shapes_only, monkeypatch):
    with pytest.raises(ValueError, match="unknown task 'shapes_txt' of lmms-eval; did you mean 'shapes_text'"):
        benchmark("shapes_txt")
    monkeypatch.setattr(benchmarks, "_manager", lambda: None)
    with pytest.raises(ValueError, match="task 'lmms:pope' needs lmms-eval, which is not installed"):
        get_task("lmms:pope")


def test_looking_for_tasks_passes_on_warnings_only_and_leaves_loguru_as_it_is(monkeypatch):
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    def noisy(self, include_path=None, include_defaults=True):
        self.logger.debug("no task in this file")
        self.logger.warning("a tag twice")
        return {}

    lines = []
    monkeypatch.setattr(TaskManager, "initialize_tasks", noisy)
    sink = logger.add(lines.append, level=0, format="{level} {message}")
    try:
        benchmarks._manager.__wrapped__()
        logger.debug("mine")
    finally:
        logger.remove(sink)
    assert lines == ["WARNING a tag twice\n", "DEBUG mine\n"]


@pytest.mark.slow
def test_a_group_is_one_task_with_its_tasks_as_families():
    task = get_task("lmms:mvbench@16")
    assert (task.name, task.frames, task.remote) == ("lmms:mvbench@16", 16, True)
    assert len(task.families) == 20 and {"mvbench_moving_count", "mvbench_episodic_reasoning"} <= set(task.families)
    assert task.identity != get_task("lmms:mvbench").identity and get_task("lmms:mvbench").frames == benchmarks.FRAMES


@pytest.mark.slow
def test_tasks_with_videos_say_how_many_frames():
    frames = {name: get_task(f"lmms:{name}").frames for name in ("videomme@32", "mlvu_dev@64", "mlvu_dev", "pope")}
    assert frames == {"videomme@32": 32, "mlvu_dev@64": 64, "mlvu_dev": benchmarks.FRAMES, "pope": None}
    for name, message in (
        ("pope@8", "has no videos, got @8"),
        ("videomme@x", "must be 1 or more, got @x"),
        ("videomme@0", "1 or more, got @0"),
    ):
        with pytest.raises(ValueError, match=f"task 'lmms:{name.partition('@')[0]}': .*{message}"):
            get_task(f"lmms:{name}")


@pytest.mark.slow
def test_a_package_that_only_a_task_needs_is_named_when_it_runs(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "decord", None)
    benchmarks._task.cache_clear()
    task = get_task("lmms:longvideobench_val_v@8")
    assert task.frames == 8
    with pytest.raises(VtrError, match="task 'lmms:longvideobench_val_v' of lmms-eval needs the package 'decord', which is not installed"):
        task.samples(1)


def test_samples_of_several_tasks_follow_each_other(monkeypatch):
    frames = [Image.new("RGB", (8, 8), (20 * n, 0, 0)) for n in range(9)]

    class Stub:
        def __init__(self, name):
            self.eval_docs = [f"{name} {n}" for n in range(3)]

        doc_to_text = doc_to_target = staticmethod(str)

        @staticmethod
        def doc_to_visual(document):
            return [frames, frames[0]] if document.startswith("a") else [frames[0]]

    for cached in (benchmarks._task, benchmarks._documents):
        cached.cache_clear()
    monkeypatch.setattr(benchmarks, "_task", Stub)
    monkeypatch.setattr(benchmarks, "_documents", lambda name: Stub(name).eval_docs)
    samples = Documents(["a", "b"], 2, 3)
    assert [sample.question for sample in samples] == ["a 0", "a 1", "b 0", "b 1"]
    assert [sample.family for sample in samples[1:3]] == ["a", "b"]
    video, image = samples[0].visuals
    assert video.indices == (0, 4, 8) and image.size == (8, 8)
    assert len(samples[0].images) == 4 and samples[0].image.size == (8, 8)
    assert name_in_source("lmms:mvbench@16") == "mvbench" and name_in_source("x@16") == "x@16"
