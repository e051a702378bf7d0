"""Fixtures of the tests of operators."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from vtr.ops.blocks import all_at_once


@pytest.fixture(scope="module", params=["as on a CPU", "as on a GPU"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module's tests twice: the way that suits a CPU, and the one that a GPU would go."""
    with all_at_once() if request.param == "as on a GPU" else nullcontext():
        yield
