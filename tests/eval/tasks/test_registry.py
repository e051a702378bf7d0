"""Tasks by name, and sources with names of their own."""

import pytest

from vtr.eval.tasks import Task, get_task, name_in_source, register_task, register_task_source, registry


def task(name):
    return Task(name, "1", "0", (name,), lambda limit: [], lambda prediction, answer: prediction == answer, 4)


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    monkeypatch.setattr(registry, "_SOURCES", dict(registry._SOURCES))


def test_a_source_builds_tasks_from_what_stands_behind_its_prefix(names):
    register_task_source("mine", "my harness")(lambda name: task(f"mine:{name}"))
    assert get_task("mine:a:b").name == "mine:a:b" and name_in_source("mine:a") == "a" and name_in_source("theirs:a") == "theirs:a"
    with pytest.raises(ValueError, match="unknown task 'theirs:a'.*; those of lmms-eval are written lmms:NAME; those of my harness"):
        get_task("theirs:a")


def test_a_name_and_a_prefix_belong_to_one_builder(names):
    with pytest.raises(ValueError, match="register_task: 'shapes' is taken"):
        register_task("shapes")(lambda: task("shapes"))
    with pytest.raises(ValueError, match="register_task_source: 'lmms' is taken"):
        register_task_source("lmms", "me")(task)
