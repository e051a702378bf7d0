"""The Python on docs/testing.md works as it is printed there."""

import re
from pathlib import Path

import pytest

from vtr.testing.tiny_models import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
A_METHOD, A_FAMILY = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", [pytest.param(A_METHOD, id="a method"), pytest.param(A_FAMILY, id="a family", marks=pytest.mark.slow)])
def test_the_page_works_as_printed(block, monkeypatch):
    monkeypatch.setitem(FAMILIES, "wider", None)  # put back as it was: absent
    exec(block, {})
