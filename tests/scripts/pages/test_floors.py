"""Rows over seeds, the floors, and the section of the model card."""

import pytest

from scripts.pages.floors import KEEPS, check_floors, floor_cells, floor_section, update_card
from vtr.eval.run.cells import Cell, fingerprint, plan_cells
from vtr.eval.summary import make_rows
from vtr.eval.tasks import Task
from vtr.registry import create_method

FAMILIES = ("existence", "text")
TASK = Task("shapes", "v1", "0", FAMILIES, lambda limit: [], lambda p, a: p == a, 4)
CONSTANTS = {"existence": 50.0, "text": 2.0}
SHARES = {"full": 0.95, "none": 0.26, 288: 0.93, 192: 0.9, 128: 0.85, 64: 0.8, 32: 0.6, 16: 0.5}

BEGIN, END = "<!-- floors:begin -->", "<!-- floors:end -->"


def content(cell, share, shares=None):
    import torch

    samples = []
    for family in FAMILIES:
        own = (shares or {}).get(family, share)
        samples += [{"id": f"{family}/{i}", "family": family, "correct": i < round(own * 100)} for i in range(100)]
    print_ = fingerprint(cell, {"name": "tiny", "sha256": "0"}, torch.float32, "sdpa", "cpu")
    return {"fingerprint": print_, "samples": samples, "summary": {"retained": 576.0, "latency_ms": 1.0}}


def contents(changes=None):
    """Result files of a checkpoint that reaches every floor, but for the changes: method or keep count -> share of right answers."""
    found = []
    for cell in floor_cells(TASK, [0, 1]):
        name = cell.settings.get("keep") or cell.name
        shares = {"existence": 0.5, "text": 0.02} if name == "none" and "none" not in (changes or {}) else None
        found.append(content(cell, {**SHARES, **(changes or {})}[name], shares))
    return found


def missed(changes=None):
    return [floor.rule for floor in check_floors(make_rows(contents(changes)), CONSTANTS) if not floor.passed]


def test_the_cells_are_full_random_at_six_budgets_and_none():
    assert len(floor_cells(TASK, [0, 1, 2])) == 1 + 6 * 3 + 1


def test_seeds_of_one_experiment_make_one_row():
    cells = [Cell(create_method("random", keep=64, seed=s), TASK, seed=s) for s in (0, 1)]
    rows = make_rows([content(cells[0], 0.4), content(cells[1], 0.6)])
    assert len(rows) == 1
    assert rows[0].seeds == (0, 1)
    assert rows[0].macro.value == pytest.approx(0.5)
    assert rows[0].outcomes["text"]["text/50"] == 0.5
    assert rows[0].budget == "keep 64"


def test_a_changed_setting_makes_another_row_and_is_named():
    methods = [create_method("fastv", keep=64, layer=layer) for layer in (2, 3)]
    rows = make_rows([content(Cell(m, TASK), 0.5) for m in methods])
    assert [row.changed_settings() for row in rows] == [{}, {"layer": 3}]


def test_a_checkpoint_that_reaches_the_floors_passes():
    assert missed() == []


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"full": 0.87}, ["full: macro accuracy at least 88 %", "random at 64: at least 8 points below full"]),
        ({"none": 0.4}, ["none: within 5 points of the best constant answer"]),
        ({288: 0.905}, ["random at 288: within 4 points of full"]),
        ({128: 0.9, 64: 0.89}, ["random at 64: at least 8 points below full"]),
        ({16: 0.75}, ["random: 16 not above 32, up to the paired interval"]),
        ({16: 0.61}, []),  # a little above, but not beyond the interval
    ],
)
def test_each_missed_floor_is_seen(changes, rules):
    assert missed(changes) == rules


def test_one_weak_family_is_seen():
    cells = contents()
    cells[0] = content(Cell(None, TASK), 0, {"existence": 1.0, "text": 0.69})
    found = [floor for floor in check_floors(make_rows(cells), CONSTANTS) if not floor.passed]
    assert "full: no family under 70 %" in [floor.rule for floor in found]
    assert "text 69.0" in next(floor.found for floor in found if "family" in floor.rule)


def test_reading_is_compared_with_the_checkpoint_it_started_from():
    rows = make_rows(contents())
    better = make_rows([content(Cell(None, TASK), 0.99)])[0]
    worse = make_rows([content(Cell(None, TASK), 0.9)])[0]
    assert not check_floors(rows, CONSTANTS, better)[-1].passed
    assert check_floors(rows, CONSTANTS, worse)[-1].passed


def test_missing_cells_are_named():
    with pytest.raises(ValueError, match="no result for random at 16"):
        check_floors(make_rows(contents()[:-3] + contents()[-1:]), CONSTANTS)


def test_the_section_is_written_between_the_marks_and_nothing_else_changes(tmp_path):
    rows = make_rows(contents())
    section = floor_section(rows, check_floors(rows, CONSTANTS), CONSTANTS)
    for keep in KEEPS:
        assert f"| random {keep} |" in section
    assert "| best constant answer | 50.0 | 2.0 | 26.0 |" in section
    assert "MISSED" not in section
    card = tmp_path / "README.md"
    card.write_text(f"# tiny\n\nbefore\n{BEGIN}\nold\n{END}\nafter\n")
    update_card(card, section)
    once = card.read_text()
    assert once == f"# tiny\n\nbefore\n{BEGIN}\n{section}\n{END}\nafter\n"
    update_card(card, section)
    assert card.read_text() == once


def test_a_card_without_marks_gets_them_and_a_broken_one_is_refused(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# tiny\n")
    update_card(card, "text")
    assert card.read_text() == f"# tiny\n\n## Floors\n\n{BEGIN}\ntext\n{END}\n"
    card.write_text(f"{END}{BEGIN}")
    with pytest.raises(ValueError, match="once each, in that order"):
        update_card(card, "text")
    with pytest.raises(ValueError, match="no file"):
        update_card(tmp_path / "gone.md", "text")


def test_floor_cells_can_be_limited():
    assert {cell.limit for cell in floor_cells(TASK, [0], limit=5)} == {5}
    assert plan_cells(["full"], [], [TASK], limit=5)[0].limit == 5
