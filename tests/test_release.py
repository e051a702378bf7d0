"""A release of transformers newer than tested: one warning and a self-check per process, and an error where that fails."""

import warnings
from types import SimpleNamespace

import pytest

import vtr
from tests.tiny_models import model_of
from vtr import versions
from vtr.engine import release


@pytest.fixture
def newer(monkeypatch):
    """As if the tested release were older than the installed one, and nothing had been checked yet."""
    monkeypatch.setattr(release, "_checked", [])
    monkeypatch.setattr(versions, "tested", lambda: {"transformers": "5.0.0"})


def test_a_newer_release_warns_once_and_is_checked(newer):
    model = model_of("llava")
    with pytest.warns(UserWarning, match=r"transformers [\d.]+ is newer than 5\.0\.0.*vtr doctor"):
        vtr.apply(model, "uniform", keep=9).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtr.apply(model, "uniform", keep=9).remove()


def test_a_release_that_fails_the_check_is_refused(newer, monkeypatch):
    import vtr.selfcheck

    monkeypatch.setattr(vtr.selfcheck, "self_check", lambda quick: [SimpleNamespace(name="cached = recomputed", passed=False)])
    for _ in range(2):  # and again: nobody gets an answer
        with (
            pytest.warns(UserWarning, match="newer"),
            pytest.raises(vtr.VtrError, match=r"cached = recomputed.*install transformers==5\.0\.0"),
        ):
            vtr.apply(model_of("llava"), "uniform", keep=9)


def test_a_tested_release_is_not_checked(monkeypatch):
    monkeypatch.setattr(release, "_checked", [])
    monkeypatch.setattr(versions, "tested", lambda: {"transformers": "99.0.0"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtr.apply(model_of("llava"), "uniform", keep=9).remove()
