"""What tests of commands share."""

import pytest

from tests.embedded import shared_model
from vtr.models import loading


@pytest.fixture
def loaded_once(monkeypatch):
    """For commands that load a model to ask it: the second one gets what the first one loaded."""
    monkeypatch.setattr(loading, "load_model", shared_model)
