"""Markdown tables: every method against random at its own budget, missing baselines named."""

from tests.eval.test_floors import TASK, content
from vtr.eval.cells import Cell, plan_cells
from vtr.eval.report import markdown
from vtr.registry import create_method
from vtr.types import Budget


def cells():
    planned = plan_cells(["full", "random", "uniform", "fastv"], [Budget(keep=64), Budget(keep=192)], [TASK], [0, 1])
    shares = {"full": 0.95, "random": 0.6, "uniform": 0.6, "fastv": 0.3}
    found = [content(cell, shares[cell.name]) for cell in planned]
    for one in found:
        one["summary"] |= {"average_tokens": 100.0, "tflops": 0.001}
    return found


def test_every_row_is_compared_with_random_at_its_budget():
    text = markdown(cells())
    assert text.count("### keep") == 2 and text.index("### keep 192") < text.index("### keep 64")
    fastv = [line for line in text.splitlines() if line.startswith("| fastv")]
    assert len(fastv) == 2 and all("worse (-30.0)" in line for line in fastv)
    assert all("not distinguishable (+0.0)" in line for line in text.splitlines() if line.startswith("| uniform"))
    assert text.count("| random (2 seeds) |") == 2


def test_missing_baselines_are_named_and_times_are_those_of_their_own_runs():
    assert "missing: pool, resize, none" in markdown(cells())
    assert "| ms |" not in markdown(cells())
    timed = content(Cell(create_method("fastv", keep=64), TASK), 0.3)
    timed["summary"]["latency_ms"] = 12.3
    text = markdown(cells(), [timed])
    assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| fastv")] == ["", "12"]
