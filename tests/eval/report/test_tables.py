"""Tables: every row against random at its own budget, missing baselines named, nothing invented."""

from typing import NamedTuple

import pytest

from tests.eval.report.made import cell, table
from vtr.eval.report import build, render
from vtr.eval.report.section import Section
from vtr.eval.report.tables import missing_baselines, published_table


def cells_of(document, title, row):
    """Column -> cell of a row that begins so, in the table of that title."""
    own = next(t for part in document.parts for t in part.tables if t.title == title)
    line = next(line for line in own.rows if line[0].text.startswith(row))
    return dict(zip(own.columns, line, strict=True))


def titles(document):
    return [t.title for part in document.parts for t in part.tables]


def test_every_budget_has_scores_cost_and_ranking_from_the_largest():
    found = titles(build(table()))
    assert found == [f"keep {keep}{what}" for keep in (192, 64) for what in ("", ": cost", ": ranking")]


@pytest.mark.parametrize("keep", [192, 64])
def test_rows_are_compared_with_random_and_with_full(keep):
    document = build(table())
    fastv, uniform = (cells_of(document, f"keep {keep}", name) for name in ("fastv", "uniform"))
    assert fastv["against random"].text.startswith("worse -30.0 (") and fastv["against random"].mark == ""
    assert uniform["against random"].text.startswith("not distinguishable") and uniform["against random"].mark == "same"
    assert uniform["relative accuracy"].value == pytest.approx(100 * 0.6 / 0.95)
    assert uniform["relative accuracy"].low < 63.1 < uniform["relative accuracy"].high
    assert cells_of(document, f"keep {keep}", "random (2 seeds)")["against random"].text == ""
    assert cells_of(document, f"keep {keep}", "full")["relative accuracy"].text == ""


def test_baselines_stand_in_every_table_and_missing_ones_are_named():
    cells = [c for c in table() if c.fingerprint["method"] not in ("pool", "none")]
    document = build(cells)
    for title in ("keep 192", "keep 64", "keep 64: cost"):
        assert cells_of(document, title, "pool (not run)")
        assert cells_of(document, title, "none (not run)")
        assert cells_of(document, title, "full")
    assert "tiny on shapes v1: keep 64: rows that belong here and are missing: pool, none" in document.warnings


def test_a_figure_that_was_not_measured_is_a_blank_and_a_column_without_any_is_named():
    short = cell("full", 0.9)
    del short.numbers["latency_ms"]
    document = build([short, cell("fastv", 0.5, keep=64, summary={"latency_ms": 12.0})])
    assert cells_of(document, "keep 64: cost", "fastv")["total ms"].value == 12.0
    assert cells_of(document, "keep 64: cost", "full")["total ms"].text == ""
    assert document.parts[0].scope.endswith(
        "Not measured in any of these runs: choosing ms, prefill ms, prefill floor ms, prefill kept floor ms, total floor ms, peak MiB."
    )
    assert "blank: not measured in that run" in document.legend


def test_milliseconds_of_a_shared_tower_are_not_shown_and_come_from_the_timed_runs():
    shared = cell("fastv", 0.3, keep=64, conditions={"tower": "shared"})
    assert "total ms" not in cells_of(build([shared]), "keep 64: cost", "fastv")
    limited = {"task": {"name": "shapes", "version": "v1", "limit": 4}}
    timed = cell("fastv", 0.3, keep=64, summary={"latency_ms": 12.3}, fingerprint=limited)
    assert cells_of(build([shared], [timed]), "keep 64: cost", "fastv")["total ms"].value == 12.3
    other = cell("fastv", 0.3, keep=64, layer=3, fingerprint=limited)
    assert "total ms" not in cells_of(build([shared], [other]), "keep 64: cost", "fastv")


def test_without_timings_nothing_depends_on_a_clock():
    slow = [cell("full", 0.9, summary={"latency_ms": 1.0, "peak_mib": 3.0}), cell("random", 0.5, keep=64, summary={"latency_ms": 9.0})]
    fast = [cell("full", 0.9, summary={"latency_ms": 2.0}), cell("random", 0.5, keep=64)]
    without = [build(cells, timings=False, plots=True) for cells in (slow, fast)]
    timed = [build(cells) for cells in (slow, fast)]
    for form in ("md", "csv", "latex", "html"):
        assert render(without[0], form) == render(without[1], form)
        assert render(timed[0], form) != render(timed[1], form)


def test_changed_settings_budgets_and_conditions_tell_rows_apart():
    bfloat16 = {"dtype": "bfloat16"}
    section = Section(
        [
            cell("fastv", 0.5, keep=64, layer=2),
            cell("fastv", 0.5, keep=64, layer=3),
            cell("fastv", 0.5, average_keep=64, layer=2),
            cell("fastv", 0.5, keep=64, layer=2, fingerprint=bfloat16),
            cell("divprune+fastv", 0.5, plan=[{"method": "divprune", "keep": 128}, {"method": "fastv", "keep": 64, "layer": 3}], keep=64),
            cell("gone", 0.5, keep=64, color="blue"),
        ]
    )
    assert sorted(section.labels.values()) == sorted(
        [
            "fastv layer=2 dtype float32",
            "fastv layer=3 dtype float32",
            "fastv layer=2 by average_keep dtype float32",
            "fastv layer=2 dtype bfloat16",
            "divprune+fastv [divprune keep=128; fastv keep=64 layer=3] dtype float32",
            "gone color=blue dtype float32",
        ]
    )


def test_an_experimental_method_is_marked():
    assert cells_of(build([cell("tokencorr", 0.5, keep=64)]), "keep 64", "tokencorr (experimental)")


def test_average_keep_is_compared_with_random_at_the_same_number():
    document = build([*table((64,)), cell("fastv", 0.9, average_keep=64.0, layer=2)])
    fastv = cells_of(document, "keep or average_keep 64", "fastv by average_keep")
    assert fastv["against random"].text.startswith("better +30.0")


def test_other_weights_under_one_name_are_another_section():
    retrained = {"model": {"name": "tiny", "sha256": "1"}}
    document = build([cell("full", 0.9), cell("full", 0.5, fingerprint=retrained)])
    assert len(document.parts) == 2 and len({part.title for part in document.parts}) == 2


class Found(NamedTuple):
    values: tuple
    conflict: bool = True
    lowest: float = 52.7
    highest: float = 57.1

    def __str__(self):
        return "52.7 (2505.19536), 57.1 (RESTORE)"


class Value(NamedTuple):
    unit: str


def test_published_numbers_stand_beside_measured_ones_at_default_settings_only():
    asked = []

    def find(model, method, tokens, visual_tokens, task):
        asked.append((model, method, tokens, visual_tokens, task))
        return Found((Value("percent"), Value("percent"))) if method == "fastv" else ()

    cells = [
        cell("fastv", 0.5, task="lmms:gqa", keep=64, layer=2),
        cell("fastv", 0.6, task="lmms:gqa", keep=64, layer=3),
        cell("full", 0.9),
    ]
    found = published_table(Section(cells[:2]), find)
    assert [c.text for c in found.rows[0]][-3:] == ["52.7 (2505.19536), 57.1 (RESTORE)", "percent", "52.7 to 57.1"]
    assert len(found.rows) == 1 and found.rows[0][3].value == 50.0
    assert asked == [("tiny", "fastv", 64.0, 576.0, "gqa")]
    assert published_table(Section(cells[2:]), find) is None


def test_published_numbers_of_the_literature_are_found():
    llava = {"model": {"name": "llava-hf/llava-1.5-7b-hf", "sha256": "0"}}
    made = cell("fastv", 0.5, task="lmms:gqa", keep=None, average_keep=192, layer=2, fingerprint=llava, summary={"average_tokens": 192.0})
    line = cells_of(build([made]), "measured against published", "fastv")
    assert "52.7" in line["published (source)"].text and "2505.19536" in line["published (source)"].text
    assert line["sources disagree"].text


def test_limits_of_pixels_tell_rows_apart_and_stand_for_resize():
    few = {"max_pixels": 1000}
    made = [
        cell("full", 0.9),
        cell("full", 0.6, fingerprint=few),
        cell("fastv", 0.7, keep=64),
        cell("fastv", 0.6, keep=64, fingerprint=few),
    ]
    section = Section(made)
    assert sorted(section.labels.values()) == ["fastv", "fastv max_pixels 1000", "full", "full max_pixels 1000"]
    rows = {label: row for row, label in section.labels.items()}
    assert section.full(rows["fastv max_pixels 1000"]) is rows["full max_pixels 1000"] and section.full(rows["fastv"]) is rows["full"]
    assert "resize" not in missing_baselines(section, list(rows.values())) and "resize" in missing_baselines(
        Section(made[::2]), Section(made[::2]).rows
    )


def test_published_numbers_of_qwen_stand_beside_ours():
    model = {"model": {"name": "Qwen/Qwen2.5-VL-7B-Instruct", "revision": "0"}}
    means = {"visual_tokens": 1000.0, "retained": 200.0, "average_tokens": 200.0}
    made = cell("divprune", 0.5, task="lmms:gqa", keep_ratio=0.2, fingerprint=model, summary=means)
    line = cells_of(build([made]), "measured against published", "divprune")
    assert line["published (source)"].text == "56.7 (2508.18264)"


def test_what_scoring_frames_takes_stands_beside_the_other_costs():
    took = {"scorer_visual_tokens": 4608.0, "scorer_tflops": 0.01, "scorer_seconds": 2.5, "scorer_prompts": 8.0}

    def scored(keep, name):
        fingerprint = {"frame_scores": {"name": name, "sha256": name}}
        return cell("quota", 0.6, keep=keep, summary=took, fingerprint=fingerprint, position_ids="renumber", exponent=2.0, compat=None)

    plain = [cell("full", 0.9), cell("random", 0.5, seed=0, keep=64)]
    document = build([*plain, scored(64, "tiny-llava")])
    own = cells_of(document, "keep 64: cost", "quota")
    assert [own[name].value for name in ("scorer tokens", "scorer GFLOPs", "scorer s")] == [4608.0, 10.0, 2.5]
    assert cells_of(document, "keep 64: cost", "random")["scorer s"].text == ""
    assert "Frames scored by tiny-llava." in document.parts[0].scope and any(line.startswith("scorer: ") for line in document.legend)
    assert not any("scorer" in line[0].text for part in document.parts for t in part.tables for line in t.rows), "there is one"
    unclocked = build([*plain, scored(64, "tiny-llava")], timings=False)
    assert "scorer s" not in cells_of(unclocked, "keep 64: cost", "quota") and "scorer tokens" in cells_of(
        unclocked, "keep 64: cost", "quota"
    )
    several = build([*plain, scored(64, "tiny-llava"), scored(64, "other")])
    for name in ("tiny-llava", "other"):
        assert any(line[0].text.endswith(f"scorer {name}") for line in several.parts[0].tables[0].rows)
    assert not any("scorer" in column for part in build(plain).parts for t in part.tables for column in t.columns)
