"""Records of `vtr bench` beside the scores. The record here is `vtr bench --model tiny-llava --methods random,fastv --keep 64 --batch 1,2
--new-tokens 1,8 --repeats 1 --threads 1`."""

import json
from pathlib import Path

import pytest

from tests.eval.report.made import cell
from tests.eval.report.test_tables import cells_of, titles
from vtr.eval.report import build, read_speed
from vtr.registry import method_class
from vtr.types.settings import default_settings

RECORD = Path(__file__).with_name("bench-tiny-llava.json")
TINY = {"model": {"name": "tiny-llava", "sha256": "0"}}


def result(name, share, seed=None, **settings):
    """A cell of tiny-llava as the runner files it: every setting, the seed apart."""
    own = {k: v for k, v in default_settings(method_class(name)).items() if k != "seed"} if name != "full" else {}
    return cell(name, share, seed=seed, fingerprint=TINY, **{**own, **settings})


def cells():
    random = [result("random", 0.5, seed, keep=64) for seed in (3, 4)]
    return [
        result("full", 0.9),
        *random,
        result("fastv", 0.7, keep=64),
        result("fastv", 0.6, keep=64, layer=3),
        result("fastv", 0.6, keep=32),
    ]


def recorded(change=lambda record: None, folder=None):
    record = json.loads(RECORD.read_text())
    change(record)
    path = folder / "changed.json"
    path.write_text(json.dumps(record))
    return read_speed(path)


def runs(record, batch, kind, name=None):
    own = next(c for c in record["cells"] if c["batch"] == batch)
    return next(row for row in own["rows"] if row["kind"] == kind and name in (None, row["name"]))


@pytest.mark.parametrize("batch", [1, 2])
def test_times_floors_and_memory_stand_beside_each_row_of_that_method_setting_and_budget(batch):
    document, record = build(cells(), speed=read_speed(RECORD)), json.loads(RECORD.read_text())
    shown = cells_of(document, f"keep 64: speed, batch {batch}", "fastv")
    row = runs(record, batch, "method", "fastv")
    (run,) = row["runs"]
    floor = next(r for r in runs_of_batch(record, batch) if r["kind"] == "schedule floor" and r["schedule"] == row["schedule"])["runs"][0]
    kept = runs(record, batch, "kept floor")["runs"][0]
    expected = {
        "choosing ms": run["choosing_ms"] / batch,
        "prefill ms": run["prefill_ms"] / batch,
        "prefill floor ms": floor["prefill_ms"] / batch,
        "prefill kept floor ms": kept["prefill_ms"] / batch,
        "8 tokens ms": run["total_ms"]["8"] / batch,
        "8 tokens floor ms": floor["total_ms"]["8"] / batch,
        "peak MiB": row["peak_bytes"] / 2**20,
    }
    assert {name: c.value for name, c in shown.items() if name != "method"} == pytest.approx(expected)
    assert cells_of(document, f"keep 64: speed, batch {batch}", "random (2 seeds)")["prefill ms"].value, "seeds make no difference"
    full = cells_of(document, f"keep 64: speed, batch {batch}", "full")
    assert full["prefill ms"].value and full["prefill floor ms"].text == ""


def runs_of_batch(record, batch):
    return next(c for c in record["cells"] if c["batch"] == batch)["rows"]


def test_other_settings_and_budgets_get_nothing_and_the_source_is_said():
    document = build(cells(), speed=read_speed(RECORD))
    own = next(t for part in document.parts for t in part.tables if t.title == "keep 64: speed, batch 1")
    assert {line[0].text for line in own.rows} == {"full", "fastv layer=2", "random (2 seeds)"}
    assert not any(title.startswith("keep 32: speed") for title in titles(document))
    facts = json.loads(RECORD.read_text())["environment"]
    scope = document.parts[0].scope
    for said in (
        RECORD.name,
        "vtr bench",
        facts["device"],
        facts["versions"]["torch"],
        facts["date"],
        "trained weights in float32",
        "batch 2",
    ):
        assert said in scope
    assert "Not measured" not in scope and any("runs of `vtr bench` by themselves" in line for line in document.legend)
    assert not [line for line in document.warnings if "json" in line or "floor" in line]


def test_without_timings_a_record_changes_nothing():
    assert build(cells(), timings=False, speed=read_speed(RECORD)) == build(cells(), timings=False)


def test_a_time_below_its_floor_is_named(tmp_path):
    def quicken(record):
        run = runs(record, 2, "method", "fastv")["runs"][0]
        run["prefill_ms"] /= 4

    found = [line for line in build(cells(), speed=recorded(quicken, tmp_path)).warnings if "floor" in line]
    assert (
        len(found) == 1 and "fastv layer=2 keep 64: prefill_ms" in found[0] and "in changed.json at batch 2 is below its floor" in found[0]
    )


def test_a_rate_above_the_peak_of_the_bench_device_is_named(tmp_path):
    def h200(record):
        record["environment"] |= {"device": "NVIDIA H200", "kind": "cuda", "driver": "1", "cuda": "13"}
        record["model"]["dtype"] = "bfloat16"

    big = cell("fastv", 0.7, fingerprint=TINY, summary={"tflops": 40.0}, **{**default_settings(method_class("fastv")), "keep": 64})
    found = [line for line in build([big], speed=recorded(h200, tmp_path)).warnings if "TFLOP/s" in line]
    assert len(found) == 2 and all("cuda NVIDIA H200" in line for line in found)


def test_a_record_that_fits_nothing_is_named(tmp_path):
    def rename(record):
        record["model"]["name"] = "llava-next-mid"

    assert (
        "changed.json is about llava-next-mid, of which there are no results here"
        in build(cells(), speed=recorded(rename, tmp_path)).warnings
    )
    other = [result("divprune", 0.5, keep=64)]
    assert (
        "bench-tiny-llava.json has no method with the settings and budgets of the results here"
        in build(other, speed=read_speed(RECORD)).warnings
    )


def test_a_checkpoint_of_the_hub_is_found_by_its_recipe(tmp_path):
    def rename(record):
        record["model"]["name"] = "llava-1.5-7b"

    assert recorded(rename, tmp_path)[0].models == ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="x"), "is not a record of vtr bench with schema 1"),
        (lambda r: r.update(kind="ops"), "has times of functions, not of a model"),
        (lambda r: r["cells"][0].pop("batch"), "lacks KeyError 'batch'; measure it again"),
    ],
)
def test_what_is_no_record_of_a_model_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        recorded(change, tmp_path)
