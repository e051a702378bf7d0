"""A report says at its top which methods are no better than `random` or `pool`, by the paired interval, and nothing of the others."""

import numpy as np

from tests.eval.report.made import cell, table
from vtr.eval.measured import as_csv, measured_in, merged, read_measured
from vtr.eval.report import FORMATS, build, render
from vtr.eval.report.build import sections_of
from vtr.eval.report.guard import no_better
from vtr.eval.stats import paired_difference


def guards(*cells):
    return build(cells).guards


def others(keep=64):
    return [cell("random", {"existence": 0.6, "text": 0.2}, keep=keep), cell("pool", {"existence": 0.5, "text": 0.5}, keep=keep)]


def test_the_better_of_both_has_to_be_beaten_on_every_family():
    (line,) = guards(*others(), cell("fastv", {"existence": 0.9, "text": 0.4}, keep=64))
    assert line == "tiny on shapes v1, keep 64: not better than random and pool by the paired interval: text: fastv"
    assert guards(*others(), cell("fastv", 0.9, keep=64)) == []
    (line,) = guards(*others(), cell("fastv", {"existence": 0.4, "text": 0.9}, keep=64))
    assert line.endswith("existence: fastv")


def test_the_shorter_list_of_names_is_shown():
    good, bad = ({"existence": share, "text": 0.9} for share in (0.9, 0.5))
    cells = [cell(name, bad, keep=64) for name in ("fastv", "dart", "todre")]
    (line,) = guards(*others(), *cells, cell("divprune", good, keep=64))
    assert line.endswith("existence: all of 4 but divprune")
    (line,) = guards(*others(), *cells)
    assert line.endswith("existence: all 3")


def test_only_rows_with_the_same_samples_and_budget_are_compared():
    assert guards(*others(192), cell("fastv", 0.1, keep=64)) == []
    (line,) = guards(others()[0], cell("fastv", 0.1, keep=64))
    assert "not better than random by the paired" in line
    assert guards(*(cell(name, 0.1, keep=64, count=9) for name in ("random", "pool", "fastv"))) == []  # too few for a verdict


def test_the_interval_is_the_paired_one():
    own, other = (cell(name, 0.5, keep=64, families=("text",), shift=shift) for name, shift in (("fastv", 3), ("random", 0)))
    (section,) = sections_of([own, other])
    row = next(row for row in section.rows if row.method == "fastv")
    step = section.resamples.difference(row, section.partner(row, "random"), "text")
    expected = paired_difference(row.outcomes, section.partner(row, "random").outcomes)
    np.testing.assert_allclose(step, expected, atol=1e-6)
    assert no_better(section, row) == ["text"]


def test_every_form_has_it_in_front():
    document = build(table())
    assert len(document.guards) == 2 and all("fastv" in line for line in document.guards)
    for form in FORMATS:
        text = render(document, form)
        assert text.lower().index("no better than chance") < text.index("relative accuracy")


def test_what_was_measured_survives_its_file_and_is_replaced_by_what_is_measured_again(tmp_path):
    (section,) = sections_of(table())
    lines = measured_in(section)
    assert {one.method for one in lines} == {row.method for row in section.rows}
    fastv = next(one for one in lines if one.method == "fastv" and one.budget == "keep 64")
    assert (fastv.macro, fastv.random, fastv.pool, fastv.full, fastv.no_better) == ("30.0", "60.0", "60.0", "95.0", "existence,text")
    file = tmp_path / "a.csv"
    file.write_text(as_csv(lines))
    assert read_measured(file) == lines
    again = measured_in(sections_of([*others(), cell("fastv", 0.9, keep=64)])[0])
    both = merged(lines, again)
    assert len(both) == len(lines) and next(one.macro for one in both if one.method == "fastv" and one.budget == "keep 64") == "90.0"
