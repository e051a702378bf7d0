"""Which cells there are, and when two of them are the same experiment."""

import json

import numpy as np
import pytest
import torch

from vtr.eval.run.cells import Cell, fingerprint, plan_cells
from vtr.eval.tasks import Task, get_task, list_tasks, register_task
from vtr.registry import create_method
from vtr.types import Budget

TASK = Task("made-up", "v1", "0", ("a",), lambda limit: [], lambda p, a: p == a, 4)
KEEPS = [Budget(keep=192), Budget(keep=64)]


def labels(cells):
    return [cell.label for cell in cells]


def test_seeds_only_for_random_methods_and_budgets_only_for_methods_with_one():
    cells = plan_cells(["full", "none", "random", "uniform"], KEEPS, [TASK], [0, 1])
    assert labels(cells) == [
        "full",
        "none",
        "random keep=192 seed 0",
        "random keep=192 seed 1",
        "random keep=64 seed 0",
        "random keep=64 seed 1",
        "uniform keep=192",
        "uniform keep=64",
    ]


def test_without_budgets_the_default_budget_is_run():
    assert labels(plan_cells(["uniform"], [], [TASK])) == ["uniform"]


def test_settings_reach_their_method_and_a_budget_there_wins():
    cells = plan_cells(["fastv", "uniform"], KEEPS, [TASK], settings={"fastv": {"layer": 3, "keep": 32}})
    assert labels(cells) == ["fastv keep=32 layer=3", "uniform keep=192", "uniform keep=64"]
    assert cells[0].settings["layer"] == 3


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        (["fast-v"], {}, "unknown method 'fast-v'; did you mean 'fastv'"),
        (["fastv"], {"fastv": {"layr": 3}}, "fastv: unknown setting 'layr'; did you mean 'layer'"),
        (["fastv"], {"dart": {"layer": 3}}, "'dart' is not among the methods that are run"),
        (["full"], {"full": {"layer": 3}}, "has no settings, got layer"),
    ],
)
def test_bad_plans_are_refused(methods, settings, message):
    with pytest.raises(ValueError, match=message):
        plan_cells(methods, KEEPS, [TASK], settings=settings)


def test_numbers_of_numpy_make_the_same_fingerprint():
    plain = plan_cells(["random"], [Budget(keep=64)], [TASK], [1, 2], limit=5, max_new_tokens=7)
    numpy = plan_cells(
        ["random"], [Budget(keep=np.int64(64))], [TASK], list(np.arange(1, 3)), limit=np.int32(5), max_new_tokens=np.int64(7)
    )
    around = ({"name": "m"}, torch.float32, "sdpa", "cpu", "llava")
    assert [fingerprint(cell, *around) for cell in numpy] == [fingerprint(cell, *around) for cell in plain]
    assert [cell.label for cell in numpy] == ["random keep=64 seed 1", "random keep=64 seed 2"]


def test_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="limit: must be at least 1, got 0"):
        plan_cells(["full"], [], [TASK], limit=0)


def test_fingerprints_are_json_and_see_every_setting():
    def of(cell, dtype=torch.float32, attention="sdpa"):
        return json.dumps(fingerprint(cell, {"name": "m", "sha256": "1"}, dtype, attention, "cpu"), sort_keys=True)

    base = Cell(create_method("fastv", keep=64), TASK)
    assert of(base) == of(Cell(create_method("fastv", keep=64), TASK))
    others = [
        of(Cell(create_method("fastv", keep=63), TASK)),
        of(Cell(create_method("fastv", keep=64, layer=3), TASK)),
        of(Cell(create_method("fastv", keep=64, position_ids="renumber"), TASK)),
        of(Cell(create_method("fastv", keep=64), TASK, limit=5)),
        of(Cell(create_method("fastv", keep=64), TASK, max_new_tokens=5)),
        of(Cell(create_method("random", keep=64, seed=1), TASK, seed=1)),
        of(Cell(create_method("random", keep=64, seed=2), TASK, seed=2)),
        of(Cell(None, TASK)),
        of(base, dtype=torch.bfloat16),
        of(base, attention="eager"),
    ]
    assert len({of(base), *others}) == len(others) + 1


def test_task_registry():
    assert "shapes" in list_tasks()
    assert get_task("shapes").families == ("existence", "attribute", "counting", "relation", "text")
    with pytest.raises(ValueError, match="unknown task 'shape'; did you mean 'shapes'"):
        get_task("shape")
    with pytest.raises(ValueError, match="'shapes' is taken"):
        register_task("shapes")(lambda: TASK)
