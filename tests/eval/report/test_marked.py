"""Blocks between marks."""

import pytest

from vtr.eval.report.marked import has_block, with_block

PAGE = "before\n<!-- tables:begin -->\nold\n<!-- tables:end -->\nafter\n"


def test_only_the_block_changes() -> None:
    assert with_block(PAGE, "tables", "new") == PAGE.replace("old", "new")
    assert has_block(PAGE, "tables") and not has_block(PAGE, "floors")


@pytest.mark.parametrize("page", ["nothing", PAGE.replace("begin", "start"), PAGE + PAGE, "<!-- tables:end --> <!-- tables:begin -->"])
def test_marks_are_there_once_each_in_order(page: str) -> None:
    with pytest.raises(ValueError, match=r"<!-- tables:begin --> and <!-- tables:end --> once each, in that order"):
        with_block(page, "tables", "new")
