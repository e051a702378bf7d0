"""Published numbers: every printed score is found under our names, and what was derived from the score files follows from them."""

from __future__ import annotations

from collections import defaultdict

import pytest

from vtr.eval.report.published import DISAGREEMENTS, SPEED, Published, find_published, load_published, read_table
from vtr.registry import list_methods

LLAVA = ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "llava-1.5-7b-hf")


def test_every_score_file_is_read():
    counts = defaultdict(int)
    for value in load_published():
        counts[value.model] += 1
    assert counts == {"llava-1.5-7b": 1209, "llava-next-7b": 443, "qwen2.5-vl-7b": 142, "llava-onevision-video": 114}
    assert all(value.source and value.table and value.unit for value in load_published())


@pytest.mark.parametrize("model", LLAVA)
def test_all_sources_of_a_cell_are_given_with_their_conflict(model):
    found = find_published(model, "pyramiddrop", 64.4, 576, "mmbench_en_dev")
    assert [(v.source, v.score) for v in found.values] == [("2505.19536", 58.8), ("2510.02912", 33.3), ("RESTORE-ICML2026", 55.6)]
    assert found.conflict
    assert (found.lowest, found.highest) == (33.3, 58.8)
    assert str(found) == "58.8 (2505.19536), 33.3 (2510.02912), 55.6 (RESTORE-ICML2026)"


def test_agreeing_sources_are_no_conflict():
    found = find_published("llava-1.5-7b", "fastv", 192, 576, "GQA")
    agreeing = [v for v in found.values if v.source != "RESTORE-ICML2026"]
    assert len(agreeing) == 3
    assert not Published(tuple(agreeing)).conflict
    assert found.conflict  # the re-run differs


def test_full_needs_no_tokens_and_appears_once_per_source():
    found = find_published("llava-1.5-7b", "full", 576, 576, "gqa")
    assert {v.method for v in found.values} == {"Vanilla"}
    assert len({(v.source, v.score) for v in found.values}) == len(found.values)


def test_shares_are_matched_as_printed():
    third = find_published("Qwen/Qwen2.5-VL-7B-Instruct", "divprune", 1000 / 3, 1000, "mme")
    assert {v.tokens for v in third.values} == {"33.3%"}
    assert not find_published("qwen2.5-vl-7b", "divprune", 340, 1000, "mme")


@pytest.mark.parametrize(
    "changed",
    [{"model": "tiny-llava"}, {"method": "fast-v"}, {"method": "mine"}, {"task": "shapes"}, {"tokens": 66}, {"model": "llava-1.5-13b-hf"}],
)
def test_what_nobody_printed_is_empty(changed):
    asked = {"model": "llava-1.5-7b", "method": "fastv", "tokens": 64, "visual_tokens": 576, "task": "gqa"}
    assert find_published(**asked)
    found = find_published(**{**asked, **changed})
    assert not found
    assert not found.conflict


def test_fine_tuned_numbers_are_not_taken_for_ours():
    found = find_published("llava-1.5-7b", "visionzip", 64, 576, "gqa")
    assert found
    assert {v.method for v in found.values} == {"VisionZip"}


def test_methods_with_published_numbers_are_found_under_their_registry_names():
    ours = [name for name in list_methods() if any(find_published("llava-1.5-7b", name, t, 576, "pope") for t in (0, 64, 192))]
    wanted = "cdpruner dart divprune fastv flowcut hired none prumerge pyramiddrop sparsevlm tome visionzip vispruner"
    assert set(wanted.split()) <= set(ours)


def test_the_list_of_disagreements_follows_from_the_scores():
    cells = defaultdict(lambda: defaultdict(set))
    for value in load_published():
        cells[value.model, value.method, value.tokens, value.benchmark][value.source].add(value.score)
    differing = {cell for cell, sources in cells.items() if len(set().union(*sources.values())) > 1}
    listed = {(row["model"], row["method"], row["tokens"], row["benchmark"]): row for row in read_table(DISAGREEMENTS)}
    assert len(listed) == 248
    assert listed.keys() == differing
    for cell, row in listed.items():
        scores = set().union(*cells[cell].values())
        assert (float(row["lowest"]), float(row["highest"])) == (min(scores), max(scores))


def test_every_speed_names_its_source():
    rows = list(read_table(SPEED))
    assert len(rows) == 66
    assert all(row["source"].strip() for row in rows)
