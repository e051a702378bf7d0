"""Rounds are interleaved on different prompts, numbers are measured, and targets are read off them."""

import time
from dataclasses import dataclass

import pytest
import torch

import vtr
from scripts.pages import speed as page
from scripts.pages import targets
from tests.bench.test_floors import First
from vtr.bench import measure, tables
from vtr.bench.ops import OPS, Op, time_ops
from vtr.bench.record import read_records, to_text
from vtr.bench.session import Asked, Counts, bench_model
from vtr.bench.shapes import build, find_shape, prompts
from vtr.bench.stopwatch import choosing_in_process_time, peak_bytes
from vtr.cost import TransformerShape, kv_bytes
from vtr.ops import fused
from vtr.types import Boundary, Remove


@dataclass(frozen=True, kw_only=True)
class Sleeper(First):
    """Waits while it chooses: wall time goes by, process time does not."""

    def steps(self, geometry):
        (own,) = super().steps(geometry)
        return (Remove(Boundary(), lambda view: time.sleep(0.3) or own.select(view)),)


@pytest.fixture(scope="module")
def llava():
    shape = find_shape("llava-tiny")
    return build(shape, torch.float32), prompts(shape, torch.float32, "cpu", 2, 3)


def test_a_cell_has_every_row_in_every_round(llava):
    model, pool = llava
    ran = []
    methods = [First(keep=9), First(keep=9, stage="prefill", layer=2), vtr.create_method("uniform", keep=9)]
    rows = measure.run_cell(model, pool, methods, 9, (1, 3), repeats=2, advance=ran.append)
    assert [row.kind for row in rows] == [measure.FULL, measure.KEPT, *[measure.METHOD] * 3, measure.FLOOR]  # boundary methods share one
    assert len(ran) == 3 * len(rows) and all(len(row.runs) == 2 for row in rows)
    middle = len(rows) // 2
    assert ran[-len(rows) :] == [row.name for row in rows[middle:] + rows[:middle]]  # another row begins each round
    llm = TransformerShape.from_config(model.config.text_config)
    for row in rows:
        assert row.runs[0]["kv_bytes"] == 2 * kv_bytes(llm, row.schedule.llm, 4)
        assert 0 < row.runs[0]["tower_ms"] < row.runs[0]["prefill_ms"] == row.runs[0]["total_ms"]["1"] < row.runs[0]["total_ms"]["3"]
        assert row.peak_bytes >= row.runs[0]["kv_bytes"]
    assert not model.model._forward_pre_hooks and "get_image_features" not in vars(model.model)


def test_no_round_begins_after_the_time_is_over(llava):
    model, pool = llava
    rows = measure.run_cell(model, pool, [First(keep=9)], 9, repeats=5, floors=False, until=time.monotonic() - 1)
    assert [len(row.runs) for row in rows] == [1, 1] and [row.kind for row in rows] == [measure.FULL, measure.METHOD]


def test_choosing_is_process_time_on_the_cpu(llava):
    model, pool = llava
    with choosing_in_process_time(), vtr.reduced(model, Sleeper(keep=9)) as reduction, torch.no_grad():
        model(**pool[0])
        assert reduction.report().choosing_ms < 200
    with vtr.reduced(model, Sleeper(keep=9)) as reduction, torch.no_grad():
        model(**pool[0])
        assert reduction.report().choosing_ms > 290


def test_peak_memory_counts_what_is_there_at_once():
    def run():
        for _ in range(3):
            torch.zeros(1 << 18)  # gone before the next
        return [torch.zeros(1 << 18) for _ in range(2)]

    assert peak_bytes(run, torch.device("cpu")) == 2 << 20


def test_a_method_that_cannot_run_is_named(llava):
    model, pool = llava
    with pytest.raises(ValueError, match="layer must be 0 to 3"):
        measure.run_cell(model, pool, [First(keep=9, stage="prefill", layer=7)], 9, repeats=1)
    refused = {}
    rows = measure.run_cell(model, pool, [First(keep=9, stage="prefill", layer=7)], 9, repeats=1, refused=refused)
    assert "layer must be 0 to 3" in refused["first"] and [row.kind for row in rows] == [measure.FULL, measure.KEPT]


@pytest.fixture(scope="module")
def record(llava):
    model, pool = llava
    asked = Asked(("uniform", "fastv", "tome", "flowcut"), (9,), (2,), (1, 3), 2, settings={"fastv": {"layer": 1}})
    saved = []
    facts = {"name": "llava-tiny", "random": True, "tokens": 36}
    found = bench_model(model, facts, lambda size: pool, asked, Counts("tiny-llava", {"flowcut 9": ()}), lambda r: saved.append(to_text(r)))
    assert len(saved) == 2 and saved[-1] == to_text(found)
    return found


def test_records_become_the_same_page_again_and_again(record, tmp_path):
    (tmp_path / "cpu.json").write_text(to_text(record))
    text = page.page(read_records(tmp_path))
    assert text == page.page(read_records(tmp_path)) and "has not run on a GPU yet" in " ".join(text.split())
    for row in record["cells"][0]["rows"]:
        assert row["kind"] == measure.FLOOR or f"\n| {row['name']} |" in text
    assert tables.spread(tables.runs_of(record["cells"][0]["rows"][2], "prefill_ms")) in text
    (tmp_path / "cpu.json").write_text("{")
    with pytest.raises(ValueError, match="cpu.json is not complete JSON"):
        read_records(tmp_path)
    (tmp_path / "cpu.json").write_text("{}")
    with pytest.raises(ValueError, match="not a result of vtr bench"):
        read_records(tmp_path)


def line(kind, name, prefill, choosing=0.0, decode=1.0, peak=100, tower=37):
    schedule = {"tower": [tower]}
    runs = [{"prefill_ms": prefill, "choosing_ms": choosing, "tower_ms": 1.0, "decode_ms": decode, "total_ms": {"1": prefill}}]
    return {"kind": kind, "name": name, "schedule": schedule, "peak_bytes": peak, "runs": 2 * runs}


def test_targets_are_read_off_the_rounds():
    rows = [line("full", "full", 100.0), line("kept floor", "kept floor", 50.0), line("schedule floor", "schedule floor", 50.0, tower=10)]
    rows += [
        line("method", "uniform", 54.0, 2.0),
        line("method", "fastv", 60.0, 4.0, 1.03, 120),
        line("method", "flowcut", 56.0, 5.5, tower=10),
    ]
    cell = {"batch": 8, "keep": 9, "rows": rows}
    found = {(v.method, v.target): v for v in targets.verdicts(cell, {"kind": "cuda"}, weights=900)}
    assert all(found["uniform", target].met for target in ("prefill", "choosing", "decode", "memory"))
    assert found["uniform", "prefill"].found == "+4.0 %"
    assert {target for (name, target), v in found.items() if name == "fastv" and not v.met} == {"prefill", "choosing", "decode", "memory"}
    assert found["fastv", "prefill"].found == "+12.0 %" and "6.0 ms more" in found["fastv", "prefill"].reason
    assert found["fastv", "memory"].found == "+2.0 %"
    assert {v.target for v in targets.verdicts(cell, {"kind": "cpu"}, 900)} == {"prefill", "choosing", "memory"}
    assert targets.tower_against_boundary(cell) == [("flowcut", 1.12)]


def test_every_op_runs_at_every_size_or_says_why():
    rows = time_ops("cpu", repeats=1, tokens=(18, 36), batches=(1, 2))
    assert len(rows) == 4 * len(OPS) and all(row["ms"][0] > 0 for row in rows)
    late = time_ops("cpu", repeats=1, tokens=(18, 36), batches=(1,), longest_s=0.0)
    assert all("by its growth" in row["left_out"] for row in late if row["tokens"] == 36)
    assert tables.ops_table(late)[0] == ["ms", "N = 18, B = 1", "N = 36, B = 1"]


def test_kernels_are_timed_behind_the_torch_path(monkeypatch):
    asked = []

    def run(made):
        asked.append(fused.fused())
        if fused.fused() and made.most > 2:
            raise RuntimeError("no device\nfor this")

    monkeypatch.setattr("vtr.bench.ops.OPS", (Op("one", run, 0, 1), Op("two", run, 0, 1, kernel=True)))
    rows = time_ops("cpu", repeats=1, tokens=(18, 36), batches=(1,), kernels=True)
    assert [row["op"] for row in rows] == ["one", "one", "two", "two", "two, Triton kernel", "two, Triton kernel"]
    assert asked == [False] * 8 + [True] * 3 and len(rows[4]["ms"]) == 1
    assert rows[5]["left_out"] == "does not run: RuntimeError: no device" and "ms" not in rows[5]
    assert {row["op"] for row in time_ops("cpu", repeats=1, tokens=(18,), batches=(1,))} == {"one", "two"}
