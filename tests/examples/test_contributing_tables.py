"""The tables of CONTRIBUTING.md are true."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OPS = TEXT[TEXT.index("| I need ... |") : TEXT.index("## What a contribution touches")]
NEEDS = re.findall(r"^\| (?!I need)(.+?) \| ((?:`[a-z_]+\.[A-Za-z_]+`(?:, )?)+) \|$", OPS, re.MULTILINE)


@pytest.mark.parametrize("row", NEEDS, ids=lambda row: row[0])
def test_what_is_needed_is_there_and_says_what_it_does(row):
    for name in re.findall(r"`(\w+)\.(\w+)`", row[1]):
        function = getattr(importlib.import_module(f"vtr.ops.{name[0]}"), name[1])
        assert callable(function) and function.__doc__ and function.__module__ == f"vtr.ops.{name[0]}"


def test_every_module_of_ops_that_two_methods_share_is_in_the_table():
    listed = {module for _, names in NEEDS for module in re.findall(r"`(\w+)\.", names)}
    assert len(NEEDS) >= 14
    users: dict[str, set[str]] = {}
    for path in (ROOT / "vtr" / "methods").glob("[a-z]*.py"):
        for module in re.findall(r"from vtr\.ops\.(\w+) import", path.read_text()):
            users.setdefault(module, set()).add(path.stem)
    shared = {module for module, methods in users.items() if len(methods) > 1}
    assert shared - {"precision", "grids"} <= listed, "what two methods share must be found by those who write a third"


def test_the_entry_point_is_toml_that_names_the_group_read_by_the_registry():
    (block,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert tomllib.loads(block) == {"project": {"entry-points": {"vtr.methods": {"loudest": "my_package.loudest"}}}}


def test_the_lines_to_read_are_counted():
    """Within 10 lines, so that a comment more needs no edit; not above the 300 that are aimed at."""
    found = re.search(r"Lines to read before a first method: about (\d+), the section above", TEXT)
    assert found is not None
    own = TEXT[TEXT.index("## A method in one file") : TEXT.index("## What a contribution touches")].count("\n")
    count = own + sum((ROOT / "vtr" / file).read_text().count("\n") for file in ("types/view.py", "methods/_score.py"))
    assert abs(count - int(found[1])) <= 10 and int(found[1]) <= 300, count
