"""What pages say of methods in words follows from what was measured."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from scripts.pages.advice import advice, cost_table, needs_table
from scripts.pages.facts import Facts, Score, read_tables
from vtr.eval.measured import Measured

ROOT = Path(__file__).parents[3]
ON = "small on shapes v1"
PAGE = f"""# Results
## {ON}
### keep 10
| method | text | macro | against random |
|---|---|---|---|
| divprune (ours) | 90.0 (85.0-95.0) | 90.0 (85.0-95.0) | better |
| random (5 seeds) | 50.0 (45.0-55.0) | 50.0 (45.0-55.0) |  |
| pool | 84.0 (80.0-84.9) | 84.0 (80.0-84.9) |  |
| fastv | 40.0 (30.0-44.0) | 40.0 (30.0-44.0) | worse |

### keep 10: speed, batch 1
| method | choosing ms | prefill ms | peak MiB |
|---|---|---|---|
| full |  | 9.0 | 3.0 |
| fastv | 1.0 | 8.0 | 2.0 |

### keep 10: cost
| method | average tokens | KV MiB |
|---|---|---|
| fastv | 20.0 | 1.0 |
| full | 40.0 | 4.0 |

## {ON}
### keep 10
| method | text | macro |
|---|---|---|
| random | 10.0 (5.0-15.0) | 10.0 (5.0-15.0) |
"""


def line(method: str, macro: str, budget: str = "keep 10", tokens: str = "10.0", **changes: str) -> Measured:
    empty = dict.fromkeys((one.name for one in fields(Measured)), "")
    given = {"on": ON, "method": method, "label": method, "budget": budget, "macro": macro, "low": macro, "high": macro, "no_better": "-"}
    return Measured(**{**empty, **given, "random": "50.0", "pool": "84.0", "tokens": tokens, "average": tokens, **changes})


LINES = [
    line("full", "99.0", budget="", tokens="40.0"),
    line("divprune", "90.0", low="85.0"),
    line("fastv", "40.0", average="20.0"),
    line("random", "50.0"),
    line("pool", "84.0"),
    line("divprune", "95.0", budget="keep 30", tokens="30.0"),
]


@pytest.fixture
def facts() -> Facts:
    tables = read_tables(PAGE)
    names = {"divprune": Score(90, 85, 95), "random": Score(50, 45, 55), "pool": Score(84, 80, 84.9), "fastv": Score(40, 30, 44)}
    return Facts(LINES, {(ON, "keep 10", name): {"text": score} for name, score in names.items()}, tables)


def test_tables_are_read_without_remarks_and_the_first_of_two_rows_counts() -> None:
    found = read_tables(PAGE)
    assert list(found[ON, "keep 10"]) == ["divprune", "random", "pool", "fastv"]
    assert found[ON, "keep 10"]["random"]["text"] == "50.0 (45.0-55.0)"
    assert found[ON, "keep 10: cost"]["fastv"] == {"average tokens": "20.0", "KV MiB": "1.0"}


def test_the_files_of_the_repository_give_scores_of_every_model() -> None:
    facts = Facts.read(ROOT)
    for on in facts.models:
        assert facts.tokens(on) / int(facts.quarter(on).split()[1]) == pytest.approx(4, abs=0.51)
        (best, *_), family = facts.at(on, facts.quarter(on)), facts.families(on)[0]
        assert all(facts.score(best, family, name) for name in ("random", "pool"))


def test_better_is_by_the_paired_interval_or_by_intervals_that_do_not_meet(facts: Facts) -> None:
    own, fast = LINES[1], LINES[2]
    assert facts.better(own, "text") and not facts.better(fast, "text") and not facts.better(LINES[3], "text")
    assert facts.worse(fast, "text") and not facts.worse(own, "text")
    assert not facts.better(replace(own, no_better="text"), "text") and facts.better(replace(fast, no_better=""), "text")
    meets = Facts(LINES, {**facts.scores, (ON, "keep 10", "pool"): {"text": Score(84, 80, 85)}}, facts.tables)
    assert not meets.better(own, "text"), "85 is in both intervals"
    assert not facts.better(own, "counting"), "not measured"


def test_the_budget_nearest_to_a_quarter_and_the_smallest(facts: Facts) -> None:
    assert facts.quarter(ON) == facts.fewest(ON) == "keep 10" and facts.budgets(ON) == ["keep 10", "keep 30"]
    assert facts.later(LINES[2]) and not facts.later(LINES[1])


def test_a_table_names_what_is_better_and_what_it_is_compared_with(facts: Facts) -> None:
    rows = needs_table(facts, [ON], facts.quarter).splitlines()
    assert rows[0] == "| need | small, 10 of 40 |"
    beside = "(1 of 2; `random` 50, `pool` 84)"
    assert rows[2:] == [
        f"| {need} | [divprune](methods/divprune.md) 90 {beside} |" for need in ("print (OCR)", "all kinds of questions together")
    ]
    none = needs_table(Facts([one for one in LINES if one.method != "divprune"], facts.scores, facts.tables), [ON], facts.quarter)
    assert none.count("none (0 of 1; `random` 50, `pool` 84)") == 2


def test_costs_are_in_the_order_of_the_prefill(facts: Facts) -> None:
    assert cost_table(facts, ON).splitlines()[2:] == [
        "| [fastv](methods/fastv.md) | prefill | 8.0 | 1.0 | 2.0 | 1.0 | 20.0 |",
        "| full | - | 9.0 | - | 3.0 | 4.0 | 40.0 |",
    ]


def test_advice_is_what_the_facts_say(facts: Facts) -> None:
    use, avoid = advice(facts, "divprune").split("\n\n")
    assert use.endswith("you ask about print (OCR) (small), all kinds of questions together (small): there it beats `random` and `pool` with "
                        "about a quarter of the tokens.")  # fmt: skip
    assert "unlike those measured" in avoid
    use, avoid = advice(facts, "fastv").split("\n\n")
    assert "beats" not in use and "below `random`" in avoid and "where 10 tokens are left, layers have 20 on average" in avoid
    assert "a measured result is needed" in advice(facts, "hired") and "no CLS token" in advice(facts, "hired")
    assert "must beat" in advice(facts, "random")


def test_what_choose_says_in_prose_is_what_its_tables_say() -> None:
    page = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    counting = [row for row in page.splitlines() if re.match(r"\| counting \| .*\(\d+ of \d+;", row)]
    better = [cell.strip() for row in counting for cell in row.split("|")[2:-1] if not cell.strip().startswith("none")]
    assert len(counting) == 2 and len(better) == 1 and better[0].startswith("[tome]") and "(1 of " in better[0]
    quarter = page.partition("<!-- quarter:begin -->")[2].partition("<!-- quarter:end -->")[0].splitlines()
    for row in quarter[3:]:
        if not row.startswith(("| print", "| all kinds")) and row:
            assert all(cell.strip().startswith("none") for cell in row.split("|")[2:-1]), row
