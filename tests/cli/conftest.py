"""What tests of commands share."""

from functools import partial

import pytest

from tests.embedded import shared_model
from vtr.eval.run import compare
from vtr.models import loading


@pytest.fixture
def quick_answers(monkeypatch):
    """For commands that load a model to ask it: the second one gets what the first one loaded, and a prefill is timed once."""
    monkeypatch.setattr(loading, "load_model", shared_model)
    monkeypatch.setattr(compare, "compare", partial(compare.compare, repeats=1))
