"""Paired differences to any method, and tables of swept settings: on the same samples, and against numpy."""

import numpy as np
import pytest

from tests.eval.report.made import cell, table
from tests.eval.report.test_tables import cells_of, titles
from vtr.eval.report import build, render
from vtr.eval.report.section import Section
from vtr.eval.stats import paired_difference


def test_every_row_is_compared_with_the_row_of_a_method_at_its_budget():
    document = build([*table(), cell("divprune", {"existence": 0.5, "text": 0.9}, keep=64)], rival="divprune")
    assert "keep 64: against divprune" in titles(document) and "keep 192: against divprune" not in titles(document)
    fastv = cells_of(document, "keep 64: against divprune", "fastv")
    assert [fastv[family].value for family in ("existence", "text", "macro")] == pytest.approx([-20, -60, -40])
    assert fastv["existence"].low < -20 < fastv["existence"].high < 0 and fastv["macro"].text.startswith("-40.0 (")
    own = next(t for part in document.parts for t in part.tables if t.title == "keep 64: against divprune")
    assert {line[0].text for line in own.rows} == {"random (2 seeds)", "uniform", "pool", "resize", "fastv"}, "not itself, not full"
    assert "tiny on shapes v1: no row of divprune on the same samples at keep 192; nothing is compared with it there" in document.warnings
    for form in ("md", "csv", "latex", "html"):
        assert "against divprune" in render(document, form)


def test_a_difference_is_paired():
    """Rows that are right on nearly the same samples: the interval of the difference is far narrower than theirs."""
    document = build([cell("fastv", 0.50, keep=64), cell("divprune", 0.53, keep=64)], rival="fastv")
    found = cells_of(document, "keep 64: against fastv", "divprune")["macro"]
    samples = {f: {f"{f}/{i}": float(i < 50) for i in range(100)} for f in ("existence", "text")}
    better = {f: {f"{f}/{i}": float(i < 53) for i in range(100)} for f in ("existence", "text")}
    assert (found.low, found.high) == pytest.approx([100 * end for end in paired_difference(better, samples)[1:]], abs=0.6)
    assert found.low > 0 and found.high < 6


def test_full_may_be_what_all_are_compared_with():
    document = build(table(), rival="full")
    assert cells_of(document, "keep 64: against full", "pool")["macro"].value == pytest.approx(-35)
    own = next(t for part in document.parts for t in part.tables if t.title == "keep 64: against full")
    assert "none" in {line[0].text for line in own.rows}


def test_other_samples_and_few_samples_are_not_compared():
    document = build([cell("fastv", keep=64), cell("divprune", keep=64), cell("pool", keep=64, count=50)], rival="pool")
    assert "keep 64: against pool" not in titles(document)
    assert any("no row of pool on the same samples at keep 64" in line for line in document.warnings)
    few = build([cell("fastv", keep=64, count=5), cell("pool", keep=64, count=5)], rival="pool")
    assert cells_of(few, "keep 64: against pool", "fastv")["macro"].text == "no verdict below 10 samples"


def test_a_method_that_was_not_run_is_refused():
    with pytest.raises(ValueError, match="--against: there are no results of 'fastw' here; did you mean 'fastv'"):
        build(table(), rival="fastw")


def test_a_swept_setting_has_a_table_against_its_default():
    cells = [cell("fastv", share, keep=64, layer=layer, position_ids="renumber") for layer, share in ((1, 0.3), (2, 0.6), (10, 0.7))]
    document = build([*cells, cell("fastv", 0.5, keep=192, layer=2)])
    assert [title for title in titles(document) if " by " in title] == ["keep 64: fastv by layer"]
    own = next(t for part in document.parts for t in part.tables if t.title == "keep 64: fastv by layer")
    assert own.columns == ("layer", "existence", "text", "macro", "against layer=2")
    assert [line[0].text for line in own.rows] == ["1", "2 (default)", "10"], "as numbers, not as text"
    steps = [line[-1].value for line in own.rows]
    assert steps[1] is None and [steps[0], steps[2]] == pytest.approx([-30, 10])
    assert np.isclose(own.rows[0][-2].value, 30)


def test_several_swept_settings_have_a_table_for_each_with_all_else_alike():
    cells = [cell("made", 0.5, keep=64, tau=tau, mode=mode) for tau in (0.5, 1) for mode in ("a", "b")]
    found = [title for title in titles(build(cells)) if " by " in title]
    assert sorted(found) == [f"keep 64: made {one}" for one in ("mode=a by tau", "mode=b by tau", "tau=0.5 by mode", "tau=1 by mode")]
    other = build([cell("made", keep=64, tau=0.5, mode="a"), cell("made", keep=64, tau=1, mode="b")])
    assert not [title for title in titles(other) if " by " in title], "two things differ: no table says which did it"


def test_methods_swept_over_the_same_values_share_a_table():
    cells = [
        cell(name, share, keep=64, layer=layer)
        for name, *shares in (("fastv", 0.3, 0.6), ("made", 0.5, 0.4))
        for layer, share in zip((1, 2), shares)
    ]
    document = build([*cells, cell("dart", 0.5, keep=64, layer=1), cell("dart", 0.6, keep=64, layer=3)])
    assert sorted(title for title in titles(document) if "by layer" in title) == ["keep 64: by layer", "keep 64: dart by layer"]
    own = next(t for part in document.parts for t in part.tables if t.title == "keep 64: by layer")
    assert own.columns == ("method", "layer=1", "layer=2", "2 against 1")
    fastv, made = own.rows
    assert [line[0].text for line in own.rows] == ["fastv", "made"]
    assert fastv[2].text.endswith(" (default)") and not made[2].text.endswith("(default)")
    assert [fastv[3].value, made[3].value] == pytest.approx([30, -10]) and np.isclose(fastv[1].value, 30)


def test_a_swept_setting_is_told_also_where_it_is_the_default():
    section = Section([cell("fastv", keep=64, layer=2), cell("fastv", keep=64, layer=3), cell("dart", keep=64, layer=2)])
    assert sorted(section.labels.values()) == ["dart", "fastv layer=2", "fastv layer=3"]


def test_positions_are_told_where_a_table_mixes_them():
    divprune, fastv = cell("divprune", keep=64, position_ids="renumber"), cell("fastv", keep=64, position_ids="keep")
    none = cell("none", position_ids="renumber")
    assert sorted(Section([divprune, fastv, none]).labels.values()) == ["divprune (renumbered)", "fastv", "none"]
    assert sorted(Section([fastv, none]).labels.values()) == ["fastv", "none"], "nothing of it is left to renumber"
    both = Section([fastv, cell("fastv", keep=64, position_ids="renumber")])
    assert sorted(both.labels.values()) == ["fastv position_ids=keep", "fastv position_ids=renumber"]
