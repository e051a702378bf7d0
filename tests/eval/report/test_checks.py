"""Every sanity check fires on its defect, names the row, and is silent on sound results."""

import numpy as np
import pytest

from tests.eval.report.made import cell, table
from vtr.eval.report import build
from vtr.eval.report.checks import peak_tflops

H200 = {"device": "cuda NVIDIA H200", "dtype": "bfloat16"}


def warnings(*cells):
    return build(cells).warnings


def test_sound_results_give_no_warning():
    assert warnings(*table()) == []


def only(*cells):
    """The warnings beside those about baselines that these few cells lack."""
    return [line for line in warnings(*cells) if "are missing" not in line]


def test_less_with_more_tokens_is_named_only_beyond_the_interval():
    found = only(cell("fastv", 0.5, keep=192), cell("fastv", 0.7, keep=64))
    assert len(found) == 1 and "fastv keep 64 (70.0 (" in found[0] and "is above keep 192 (50.0 (" in found[0]
    assert only(cell("fastv", 0.50, keep=192), cell("fastv", 0.51, keep=64, shift=50)) == []
    assert only(cell("fastv", 0.5, keep=192), cell("divprune", 0.7, keep=64)) == []


def test_a_rate_above_the_peak_of_the_device_is_named():
    possible, impossible = ({"tflops": 4.0, "latency_ms": ms} for ms in (9.0, 8.0))  # 889 and 1000 TFLOP/s of 989.4
    assert only(cell("fastv", keep=64, summary=possible, fingerprint=H200)) == []
    found = only(cell("fastv", keep=64, summary=impossible, fingerprint=H200))
    assert len(found) == 1 and "1000 TFLOP/s" in found[0] and "989" in found[0]
    assert only(cell("fastv", keep=64, summary=impossible)) == []  # the peak of a CPU is not known


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("cuda NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("cuda NVIDIA L40S", "float16", 362.0),
        ("cuda NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("cuda Tesla T4", "float16", 65.0),
        ("cuda NVIDIA GeForce RTX 4090", "float16", 330.3),
        ("cuda NVIDIA GeForce RTX 3090 Ti", "float32", 40.0),
        ("cuda NVIDIA GeForce RTX 3090", "bfloat16", 142.0),
        ("cuda NVIDIA GeForce RTX 4080 SUPER", "float16", None),
        ("cuda NVIDIA GeForce RTX 4090 Laptop GPU", "float16", None),
        ("cpu", "float32", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(device, dtype, peak):
    assert peak_tflops(device, dtype) == peak


def test_unequal_samples_are_named_and_not_compared():
    cells = [*table((64,)), cell("divprune", 0.9, keep=64, count=80)]
    assert len(found := warnings(*cells)) == 1
    assert "divprune keep 64 has 160 samples, 160 of the 200 of the others; it is not compared" in found[0]
    row = next(line for line in build(cells).parts[0].tables[0].rows if line[0].text == "divprune")
    assert row[-2].text == row[-1].text == ""


def test_other_families_have_no_macro():
    document = build([*table((64,)), cell("divprune", 0.9, keep=64, families=("text",))])
    own = document.parts[0].tables[0]
    row = dict(zip(own.columns, next(line for line in own.rows if line[0].text == "divprune"), strict=True))
    assert row["text"].text and not row["existence"].text and not row["macro"].text


def test_mixed_conditions_in_one_table_are_named():
    for change in (
        {"dtype": "bfloat16"},
        {"attention": "eager"},
        {"device": "cuda X"},
        {"versions": {"torch": "2.11", "transformers": "5.23.0"}},
    ):
        found = only(cell("fastv", keep=64), cell("divprune", keep=64, fingerprint=change))
        assert any(f"mixed {next(iter(change)).replace('versions', 'torch')} in one table" in line for line in found), change


def test_two_position_settings_of_one_method_are_named():
    found = only(cell("fastv", keep=64, position_ids="keep"), cell("fastv", keep=64, position_ids="renumber"))
    assert found == ["tiny on shapes v1: fastv keep 64 stands with position_ids keep and renumber; these are different experiments"]
    assert only(cell("fastv", keep=64, position_ids="keep"), cell("divprune", keep=64, position_ids="renumber")) == []


def test_one_experiment_with_two_versions_of_the_code_is_named():
    found = only(*(cell("fastv", keep=64, layer=2, fingerprint={"code": code}) for code in ("aaa", "bbb")))
    assert found == ["tiny on shapes v1: fastv keep 64 stands in 2 rows: code aaa, bbb"]


def test_more_tokens_than_asked_for_are_named():
    made = cell("fastv", keep=64)
    assert only(made) == []
    object.__setattr__(made, "most_retained", 68)
    assert only(made) == ["tiny on shapes v1: fastv keep 64 left 68 visual tokens of one image"]


def test_few_samples_are_named_and_very_few_give_no_verdict():
    for count, verdict in ((1, "no verdict below 10 samples"), (9, "no verdict below 10 samples"), (10, "better +40.0")):
        document = build([cell("random", 0.6, keep=64, count=count), cell("fastv", 1.0, keep=64, count=count)])
        row = next(line for line in document.parts[0].tables[0].rows if line[0].text == "fastv")
        assert row[-1].text.startswith(verdict) and (row[-1].value is None) == (count < 10), count
    assert "fewer than 30 samples (existence 20, text 20)" in only(cell("fastv", keep=64, count=20))[0]


def test_means_over_different_task_lists_are_refused():
    tasks = [c for task in ("gqa", "pope") for c in (cell("full", 0.8, task=task), cell("fastv", 0.4, task=task, keep=64, layer=2))]
    document = build([*tasks, cell("divprune", 0.8, task="gqa", keep=64)])
    assert document.parts[-1].title == "tiny over all tasks"
    own = next(t for t in document.parts[-1].tables if t.title == "keep 64")
    rows = {line[0].text: line for line in own.rows}
    assert rows["fastv"][-1].value == pytest.approx(50.0) and rows["fastv"][-1].low < 50 < rows["fastv"][-1].high
    assert rows["divprune"][-1].text == "" and rows["divprune"][1].value == pytest.approx(100.0)
    assert "tiny, keep 64: no mean for divprune, which has no relative accuracy on pope" in document.warnings


def test_means_over_tasks_in_other_dtypes_are_named():
    cells = [cell("full", 0.8, task="gqa"), cell("full", 0.8, task="pope", fingerprint={"dtype": "bfloat16"})]
    assert "tiny over all tasks: mixes dtype bfloat16, float32" in warnings(*cells)


def test_a_mean_over_tasks_is_narrower_than_one_task():
    tasks = [c for task in "abcd" for c in (cell("full", 0.8, task=task), cell("fastv", 0.4, task=task, keep=64))]
    line = build(tasks).parts[-1].tables[-1].rows[0]
    widths = [c.high - c.low for c in line[1:]]
    assert widths[-1] == pytest.approx(np.mean(widths[:-1]) / 2, rel=0.15)


def test_one_seed_of_random_is_named():
    found = only(cell("random", seed=0, keep=64), cell("fastv", keep=64), cell("random", seed=0, keep=32))
    assert found == [
        "tiny on shapes v1: random has one seed at keep 64: differences to it are differences to that draw; run it with --seeds 0,1,2"
    ]
    assert only(*(cell("random", seed=seed, keep=64) for seed in (0, 1)), cell("fastv", keep=64)) == []
